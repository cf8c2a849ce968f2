"""Whether a bundle was exported from a checkpoint as it is now: from its weights, its schedule and its tokenizer."""

from __future__ import annotations

from dataclasses import asdict

from tokenizers import Tokenizer

from magicface_rt.bundle import Bundle
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.values.shown import shown

from .checkpoint import Checkpoint

__all__ = ["why_not_made_from"]


def why_not_made_from(bundle: Bundle, checkpoint: Checkpoint, content_hash: str | None = None) -> str | None:
    """Return in what a bundle differs from a checkpoint, as the beginning of a message; None if in nothing.

    The configurations of the networks are not compared: they decide the graphs, which `verify` compares.

    content_hash  the checkpoint's, if it is known; else all of its weights are read
    """
    found = checkpoint.content_hash() if content_hash is None else content_hash
    if bundle.checkpoint_hash != found:
        return (
            f"bundle {bundle.path} was exported from a checkpoint with hash {bundle.checkpoint_hash[:16]}..., and "
            f"{checkpoint.path} has {found[:16]}..."
        )
    mine, theirs = asdict(bundle.schedule), asdict(checkpoint.schedule)
    mine |= {name: bundle.tokenizer[name] for name in ("pad_token_id", "max_length")}
    theirs |= {"pad_token_id": checkpoint.pad_token_id, "max_length": checkpoint.max_length}
    for name, value in mine.items():
        if value != theirs[name]:
            return (
                f"bundle {bundle.path} was exported with {name} {shown(value)}, and {checkpoint.path} has "
                f"{shown(theirs[name])} by now"
            )
    if not _same_tokenizer((bundle.path / bundle.tokenizer["file"]).read_bytes(), checkpoint.tokenizer_json.encode()):
        return f"bundle {bundle.path} was exported with another tokenizer than {checkpoint.path} has by now"
    return None


def _same_tokenizer(one: bytes, other: bytes) -> bool:
    """Whether two files of tokenizers say the same: other releases of `tokenizers` may write it in another way."""
    if one == other:
        return True
    try:
        return bool(Tokenizer.from_buffer(one).to_str() == Tokenizer.from_buffer(other).to_str())
    except Exception as error:  # the package raises no class of its own
        reraise_if_interrupt(error)
        return False
