"""The README says what the package does."""

import re
from pathlib import Path

from jaxrl_llm import listing

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_table_of_methods_is_the_one_the_package_prints():
    shown = re.search(r"<!-- methods: jaxrl_llm list --markdown -->\n(.*?)\n<!-- /methods -->", README, re.DOTALL)
    assert shown is not None and shown[1] == listing.markdown()


def test_every_config_it_names_exists():
    root = Path(__file__).parent.parent
    named = set(re.findall(r"configs/[\w/]+\.yaml", README))
    assert named and all((root / name).is_file() for name in named)
