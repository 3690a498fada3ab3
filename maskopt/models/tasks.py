"""Tasks of lm-eval (EleutherAI's evaluation harness), run on models that are loaded already."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskopt.errors import MaskoptError, is_memory_failure
from maskopt.files import reason
from maskopt.models.checks import check_causal, check_tokenizer, require_positive
from maskopt.models.context import context_length
from maskopt.models.replay import evaluation_mode
from maskopt.threads import sized_threads

__all__ = ["TaskScore", "Tasks", "require_lm_eval"]

_SEED = 1234  # lm-eval's own default, so that its program gives the same figures
_LISTED = 5  # names at most that a message proposes


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task.

    Parameters
    ----------
    task : str
        Name of the task, or of a group of tasks.
    metric : str
        Name of the metric, such as acc.
    filter : str
        How answers were extracted before they were compared; "none" for tasks that compare likelihoods.
    value : float
    error : float or None
        Standard error of the value over the examples; None where there is none.
    examples : int or None
        Number of examples; None for groups.
    shots : int or None
        Number of solved examples in front of each question; None for groups.
    higher_is_better : bool or None
        None where lm-eval does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    examples: int | None
    shots: int | None
    higher_is_better: bool | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary that `json.dump` takes."""
        return asdict(self)


def require_lm_eval() -> None:
    """Check that lm-eval, an optional dependency, is installed.

    Raises
    ------
    MaskoptError
        If it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MaskoptError('Tasks need lm-eval, which is missing: pip install "maskopt[eval]".')


class Tasks:
    """Tasks that are found and whose data are loaded, before any model is.

    Parameters
    ----------
    names : sequence of str
        Names of tasks, groups or tags of lm-eval, patterns of names (``arc_*``), or YAML files of tasks.
    include_path : path-like, optional
        Folder with further task files, whose names can then be given.
    show : bool
        Whether the progress bars and notes of lm-eval are shown on standard error.

    Attributes
    ----------
    names : tuple of str
        What the names and patterns stand for.
    version : str
        Of lm-eval.

    Raises
    ------
    MaskoptError
        If lm-eval is missing, a task is unknown, or its file or data cannot be loaded.

    Notes
    -----
    Files of tasks may name Python functions, which are then run. lm-eval reads data files that a task names relative to
    the current folder, and takes data sets of the hub from its cache where HF_HUB_OFFLINE=1 is set.

    Examples
    --------
    >>> from maskopt.models import Tasks, load_model
    >>> tasks = Tasks(["arc_easy", "my_task.yaml"])  # doctest: +SKIP
    >>> scores = tasks.evaluate(*load_model("pruned"), limit=100)  # doctest: +SKIP
    """

    def __init__(self, names: Sequence[str], include_path: str | Path | None = None, show: bool = False) -> None:
        require_lm_eval()
        self._show = show
        self.version = importlib.metadata.version("lm_eval")
        if include_path is not None and not Path(include_path).is_dir():
            raise MaskoptError(f"The folder of tasks {include_path} does not exist or is not a folder.")
        if not names:
            raise MaskoptError("No task is named; give names of lm-eval or YAML files.")
        for name in filter(_is_file_name, names):
            if not Path(name).is_file():
                raise MaskoptError(f"The task file {name} does not exist or is not a file.")
        with _muted(not show):
            from lm_eval.tasks import TaskManager

            try:
                manager = TaskManager(include_path=None if include_path is None else str(include_path))
            except Exception as error:  # of whatever kind YAML and lm-eval raise
                raise MaskoptError(f"The tasks in {include_path} cannot be read: {reason(error)}.") from error
            self.names = tuple(dict.fromkeys(one for name in names for one in self._matches(manager, name)))
            try:
                self._loaded = manager.load(list(self.names))
            except Exception as error:  # of data sets, the hub, YAML, and what the files' own functions raise
                raise MaskoptError(
                    f"The {'task' if len(self.names) == 1 else 'tasks'} {', '.join(self.names)} cannot be loaded: "
                    f"{reason(error)}."
                ) from error

    def _matches(self, manager: Any, name: str) -> list[str]:
        if _is_file_name(name):
            return [name]
        found: list[str] = manager.match_tasks([name])
        if not found and Path(name).is_dir():
            raise MaskoptError(f"{name} is a folder; give it with --include-path, and name the tasks in it.")
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, _LISTED)
            hint = f"; similar names: {', '.join(near)}" if near else ""
            raise MaskoptError(f"lm-eval {self.version} has no task {name!r}{hint}; lm-eval ls tasks lists all.")
        return found

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None = None,
        batch_size: int = 1,
    ) -> list[TaskScore]:
        """Run the tasks on a model, with the seeds and the settings of lm-eval's own program.

        Parameters
        ----------
        model : PreTrainedModel
            A causal language model; its mode is restored.
        tokenizer : PreTrainedTokenizerBase
            The model's.
        limit : int, optional
            Examples at most of each task, for trials.
        batch_size : int
            Examples read at a time.

        Returns
        -------
        list of TaskScore
            In lm-eval's order: of each task its metrics.

        Raises
        ------
        MaskoptError
            If the model is no causal language model, or a task fails on it.
        """
        check_causal("Tasks need", model)
        check_tokenizer(tokenizer)
        require_positive(batch_size=batch_size, **({} if limit is None else {"limit": limit}))
        prefix = _prefix(model, tokenizer)
        size = sum(weight.numel() for weight in model.parameters())
        with _muted(not self._show), evaluation_mode(model), sized_threads(size):
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            self._seed()
            try:
                wrapped = HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    max_length=context_length(model, tokenizer),
                    prefix_token_id=prefix,
                )
                results = lm_eval.evaluate(wrapped, self._loaded, limit=limit, log_samples=False)
            except Exception as error:  # of tasks' own functions, and of metrics that need further packages
                if is_memory_failure(error):
                    raise
                raise MaskoptError(
                    f"The tasks {', '.join(self.names)} failed on the {type(model).__name__}: {reason(error)}."
                ) from error
        return list(_scores(results))

    def _seed(self) -> None:
        """Seed what tasks draw from, as lm-eval's own program does before every run."""
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)


def _is_file_name(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _prefix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands before a text that begins with its first predicted token."""
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id, model.config.eos_token_id)
    for token in found:
        if isinstance(token, int):
            return token
    raise MaskoptError(
        f"Tasks need a token that begins or ends a text, which neither the {type(tokenizer).__name__} nor the "
        f"configuration of the {type(model).__name__} names."
    )


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, values in results["results"].items():
        better = results["higher_is_better"].get(task) or {}
        for key, value in values.items():
            metric, comma, extracted = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{extracted}")
            yield TaskScore(
                task,
                metric,
                extracted,
                float(value),
                None if error is None or isinstance(error, str) else float(error),
                (results["n-samples"].get(task) or {}).get("effective"),
                results["n-shot"].get(task),
                better.get(metric),
            )


@contextlib.contextmanager
def _muted(wanted: bool) -> Iterator[None]:
    """Keep the warnings of lm-eval away, and if wanted its progress bars too, which cannot be switched off."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()) if wanted else contextlib.nullcontext():
            yield
    finally:
        logger.setLevel(level)
