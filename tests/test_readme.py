"""The README and the list of methods say what the package does."""

import re
from pathlib import Path

from jaxrl_llm import listing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_methods_are_those_the_package_prints():
    shown = re.search(r"<!-- jaxrl_llm list --by-axis -->\n(.*?)\n<!-- /list -->", README, re.DOTALL)
    assert shown is not None and shown[1] == listing.by_axis()


def test_the_document_of_the_methods_is_the_one_the_package_prints():
    assert (ROOT / "docs" / "algorithms.md").read_text() == listing.document()


def test_every_config_it_names_exists():
    named = set(re.findall(r"configs/[\w/]+\.yaml", README))
    assert named and all((ROOT / name).is_file() for name in named)
