"""Options of recovery, and the functions that read them."""

from typing import TYPE_CHECKING, Annotated

import typer

from maskopt.cli.options import check_unused
from maskopt.errors import MaskoptError

if TYPE_CHECKING:
    from maskopt.models import Calibration
    from maskopt.recovery import Recovery

__all__ = [
    "RANK",
    "RECOVERY_RULES",
    "HeldOutOption",
    "RecoverCheckpointingOption",
    "RecoverEpochsOption",
    "RecoverMasksOption",
    "RecoverParametersOption",
    "RecoverRankOption",
    "RecoverTokensOption",
    "further_windows",
    "parse_recovery",
]

RANK = 16
"""Of the changes of --recover-parameters lora, by default."""

RecoverEpochsOption = Annotated[
    float | None,
    typer.Option(
        "--recover-epochs",
        metavar="N",
        help="Passes over the windows to fit, for each block and for the model.",
        show_default="4 for blocks, 2 for the model",
    ),
]
RecoverTokensOption = Annotated[
    int | None,
    typer.Option("--recover-tokens", metavar="N", min=1, help="Tokens to fit on, in place of --recover-epochs."),
]
RECOVERY_RULES = (
    "continuation",
    "fixed",
    "reselection",
    "admm",
    "drop-and-grow",
    "frank-wolfe",
    "bip",
    "policy-gradient",
    "gumbel",
)
"""Names of `maskopt.recovery.RULES`, written out because its import takes seconds."""
RecoverMasksOption = Annotated[
    str | None,
    typer.Option(
        "--recover-masks",
        metavar="RULE",
        help=f"How masks move meanwhile; one of {', '.join(RECOVERY_RULES)}.",
        show_default="continuation for blocks, fixed for the model",
    ),
]
RecoverParametersOption = Annotated[
    str,
    typer.Option(
        "--recover-parameters",
        metavar="WHICH",
        help="What is fitted: all parameters of the blocks, the pruned weights (pruned), norms and biases alone "
        "(vectors), or these and masked low-rank changes of the pruned weights (lora).",
    ),
]
RecoverRankOption = Annotated[
    int, typer.Option("--recover-rank", metavar="N", min=1, help="Rank of the changes of --recover-parameters lora.")
]
RecoverCheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--recover-checkpointing",
        help="While the whole model is fitted, compute activations inside its blocks a second time instead of keeping "
        "them: less memory, up to a third more time.",
    ),
]
HeldOutOption = Annotated[
    int | None,
    typer.Option(
        "--held-out",
        metavar="N",
        help="Further windows of the calibration text on which nothing is chosen: errors are measured on them as well, "
        "and recovery stops by them; 0 for none.",
        show_default="an eighth of --samples",
    ),
]


def further_windows(
    calibration: "Calibration", number: int | None, fits: bool
) -> "tuple[Calibration | None, Calibration | None]":
    """Return windows that are held out of a calibration, and twice as many as it has to fit blocks and the model to.

    Parameters
    ----------
    calibration : Calibration
    number : int, optional
        Of windows to hold out: by default an eighth; none for 0.
    fits : bool
        Whether blocks or the model are fitted by gradient steps.

    Raises
    ------
    MaskoptError
        If the number is negative.
    """
    count = max(1, calibration.samples // 8) if number is None else number
    if count < 0:
        raise MaskoptError(f"--held-out must be a number of windows, or 0 for none; got {count}.")
    from maskopt.models.windows import FURTHER

    fitted = FURTHER * calibration.samples if fits else 0
    if count + fitted == 0:
        return None, None
    others = calibration.apart(count + fitted)
    return (
        others.at(others.starts[:count]) if count else None,
        others.at(others.starts[count:]) if fitted else None,
    )


def parse_recovery(
    level: str,
    epochs: float | None = None,
    tokens: int | None = None,
    masks: str | None = None,
    parameters: str = "all",
    seed: int = 0,
    rank: int = RANK,
    checkpointing: bool = False,
) -> "Recovery | None":
    """Return the settings of a recovery; None where the level is "none".

    Raises
    ------
    MaskoptError
        If an option is not one of those there are, or has no effect because nothing is recovered.
    """
    if level not in ("none", "block", "model"):
        raise MaskoptError(f"There is no recovery {level!r}; choose none, block or model.")
    if level == "none":
        given = {
            "--recover-epochs": epochs is not None,
            "--recover-tokens": tokens is not None,
            "--recover-masks": masks is not None,
            "--recover-parameters": parameters != "all",
            "--recover-rank": rank != RANK,
            "--recover-checkpointing": checkpointing,
        }
        check_unused(given, "says how a recovery works, and there is none without --recover block or --recover model")
    from maskopt.recovery import RULES, Recovery

    if masks is not None and masks not in RULES:
        raise MaskoptError(f"There is no rule {masks!r} for masks in recovery; choose {', '.join(RULES)}.")
    rule = None if masks is None else RULES[masks]()
    chosen = "block" if level == "none" else level
    made = Recovery(
        chosen,  # type: ignore[arg-type]  # checked inside
        epochs,
        tokens,
        parameters,  # type: ignore[arg-type]  # checked inside
        rule,
        seed=seed,
        rank=rank,
        checkpoint=checkpointing,
    )
    return None if level == "none" else made
