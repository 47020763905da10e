"""The transformers classes, as what our decoder must equal. Import after `pytest.importorskip("torch")`."""

from typing import Any

import numpy as np
import torch
import transformers

torch.set_num_threads(1)


def model(config: dict[str, Any], seed: int = 0) -> Any:
    """A float32 model of its transformers class, with random weights that are nowhere neutral."""
    made = transformers.AutoConfig.for_model(**config)
    made._attn_implementation = "eager"
    torch.manual_seed(seed)
    out = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for p in out.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return out


def logits(model: Any, tokens: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Logits [B,S,V]; `valid` [B,S] masks padding, with positions counted over valid tokens."""
    kw = {}
    if valid is not None:
        kw["attention_mask"] = torch.tensor(valid.astype(np.int64))
        kw["position_ids"] = torch.tensor(np.maximum(valid.cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), **kw).logits.double().numpy()
