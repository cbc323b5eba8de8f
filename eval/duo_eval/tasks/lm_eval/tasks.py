"""Find and check tasks of lm-evaluation-harness by name, with local data, before any model is loaded."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from duo_eval.tasks.lm_eval.code_eval import sandboxed
from duo_eval.tasks.rows import read_rows

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def load_tasks(
    names: Sequence[str],
    *,
    include: Sequence[Path] = (),
    data: Mapping[str, Path] | None = None,
    unsafe: bool = False,
) -> tuple[dict[str, Any], TaskManager]:
    """Load tasks with their data; returns what `TaskManager.load` does, and the manager.

    Args:
        names: tasks, groups or tags of lm-eval or of `include`, or paths of YAML files.
        include: folders of further YAML tasks, which go before lm-eval's own.
        data: JSON lines that replace a task's data set, by task; every split is the whole file.
        unsafe: run generated code even where it cannot be isolated.

    Raises:
        ValueError: an unknown task, data for a task that is not asked for, a malformed file (with the line), or data
            that cannot be loaded.
        FileNotFoundError: a missing folder or file.
    """
    data = dict(data or {})
    for folder in include:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of tasks at {str(folder)!r}")
    unused = sorted(set(data) - set(names))
    if unused:
        raise ValueError(f"data was given for {', '.join(unused)}, which --tasks does not name")
    rows = {name: read_rows(path) for name, path in data.items()}
    manager = _manager(names, include)
    unknown = [name for name in names if name not in manager.task_index and not Path(name).is_file()]
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=4)
        hint = f"close to it are {', '.join(close)}" if close else "lm-eval ls tasks lists them"
        raise ValueError(f"no task {unknown[0]!r} among lm-eval's {len(manager.all_tasks)}: {hint}")
    configs: list[Any] = []
    with sandboxed(unsafe=unsafe):
        for name in names:
            _check_files(_config(name, manager))
            if name in rows:
                config = _config(name, manager, resolve=True)
                if "task" not in config:
                    raise ValueError(f"{name} is a group of tasks: give data to one of them")
                configs.append({**config, "custom_dataset": _given(config, rows[name])})
            else:
                configs.append(name)
        try:
            return dict(manager.load(configs)), manager
        except (ValueError, KeyError, OSError, ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"the data of {', '.join(names)} could not be loaded: {type(error).__name__}: {error}; without a hub, "
                "give --data TASK=FILE"
            ) from error


def leaves(loaded: Mapping[str, Any]) -> Iterable[Any]:
    """The tasks, including those inside groups."""
    return loaded["tasks"].values()


def _manager(names: Sequence[str], include: Sequence[Path]) -> TaskManager:
    """An index of tasks, of few folders where that is enough: reading all of lm-eval's takes many seconds."""
    own = Path(lm_eval.tasks.__file__).parent
    paths = [str(folder) for folder in include]
    likely = [str(own / name) for name in names if not Path(name).is_absolute() and (own / name).is_dir()]
    manager = TaskManager(include_path=[*likely, *paths], include_defaults=False)
    kinds = {name: manager.task_index[name].kind for name in names if name in manager.task_index}
    # The tasks of a group may be in other folders.
    if all(Path(name).is_file() or kinds.get(name) is Kind.TASK for name in names):
        return manager
    return TaskManager(include_path=paths)


def _config(name: str, manager: TaskManager, *, resolve: bool = False) -> dict[str, Any]:
    """A task's settings from its file, with the functions that it names if asked to; nothing for tags."""
    entry = manager.task_index.get(name)
    path = entry.yaml_path if entry else Path(name)
    return dict(load_yaml(path, resolve_func=resolve)) if path else {}


def _check_files(config: Mapping[str, Any]) -> None:
    """Read local JSON lines once: the data-set library does not name the line that it cannot read."""
    files = (config.get("dataset_kwargs") or {}).get("data_files") if config.get("dataset_path") == "json" else None
    listed = files.values() if isinstance(files, Mapping) else [files]
    for entry in listed:
        for file in entry if isinstance(entry, list) else [entry]:
            if isinstance(file, str) and "://" not in file and not set(file) & set("*?["):
                read_rows(Path(file))


def _given(config: Mapping[str, Any], rows: list[dict[str, Any]]) -> Any:
    """A loader of the same rows for every split that a task names."""
    import datasets

    splits = {str(config[split]) for split in SPLITS if config.get(split)}

    def load(**_: Any) -> dict[str, Any]:
        return {split: datasets.Dataset.from_list(rows) for split in splits}

    return load
