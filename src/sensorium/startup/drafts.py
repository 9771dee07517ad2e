"""A draft model, looked at before anything is loaded: what it goes with, and whether its tokens are the model's."""

from __future__ import annotations

from pathlib import Path

from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.ranks import FLAG
from sensorium.config import DRAFT_FLAG, EngineConfig
from sensorium.errors import CheckpointError, StartupError

LISTED = 40  # characters of a token in an error


def open_draft(name: str, folder: Path, model: Checkpoint, engine: EngineConfig) -> Checkpoint:
    """The draft model `name` of a model. StartupError if one cannot guess for the other."""
    if engine.tensor_parallel_size > 1:
        raise StartupError(f"{DRAFT_FLAG}: a model that is split over devices ({FLAG}) takes no draft model")
    if not engine.speculative_tokens:
        raise StartupError(f"{DRAFT_FLAG} guesses nothing with --speculative-tokens 0: leave one of them out")
    if engine.device == "cuda":
        raise StartupError(f"{DRAFT_FLAG} is offered on a CPU only: leave it out, or use --device cpu")
    if "generate" not in model.family.tasks or model.family.encoder is not None:
        raise StartupError(f"{DRAFT_FLAG} guesses text, and {model.family.title} writes none")
    try:
        draft = open_checkpoint(folder)
    except CheckpointError as error:
        raise StartupError(f"{DRAFT_FLAG} {name}: {error.message}") from None
    if "generate" not in draft.family.tasks or draft.family.encoder is not None:
        raise StartupError(f"{DRAFT_FLAG} {name}: {draft.family.title} writes no text, so it cannot guess any")
    check_vocabulary(name, draft, model)
    return draft


def check_vocabulary(name: str, draft: Checkpoint, model: Checkpoint) -> None:
    """StartupError unless every token id is the same token to both. One of them may know more tokens, as a model that
    sees has some that a model of text has not, and each pads its embedding as it likes; but it must have a row for all
    of the model's."""
    theirs, ours = _tokens(draft), _tokens(model)
    differing = min((number for number in theirs.keys() & ours.keys() if theirs[number] != ours[number]), default=None)
    if differing is not None:
        raise StartupError(
            f"{DRAFT_FLAG} {name}: its vocabulary is another one, of {len(theirs)} tokens where the model has "
            f"{len(ours)}: token {differing} is {_shown(theirs[differing])}, the model's is {_shown(ours[differing])}"
        )
    if draft.vocab_size <= max(ours):
        raise StartupError(
            f"{DRAFT_FLAG} {name}: its embedding has {draft.vocab_size} rows for {len(theirs)} tokens, and the model's "
            f"{len(ours)} tokens go up to number {max(ours)}"
        )


def _tokens(checkpoint: Checkpoint) -> dict[int, str]:
    from sensorium.prompt.tokenizer import Tokenizer  # with its library, which an engine need not wait for

    known = Tokenizer.from_folder(checkpoint.folder, vocab_size=checkpoint.vocab_size).raw
    return {number: token for token, number in known.get_vocab(with_added_tokens=True).items()}


def _shown(token: str) -> str:
    return repr(token if len(token) <= LISTED else token[:LISTED] + "…")
