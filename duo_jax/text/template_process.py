"""The process that renders chat templates, one request a line: a template is a program that came with the weights.

Run as a script by `duo_jax.text.renderer`, which limits its time. It limits its own memory. Imports nothing of this
package.
"""

import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes, besides what the interpreter has


def render_function() -> Any:
    """The function of transformers that renders templates, if possible without its slow imports."""
    spec = find_spec("transformers")
    if spec is not None and spec.origin is not None:
        root = Path(spec.origin).parent
        # Packages with a path and nothing in them: the module needs little of transformers, which takes a second.
        for name, path in (("transformers", root), ("transformers.utils", root / "utils")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
        try:
            from transformers.utils.chat_template_utils import render_jinja_template

            return render_jinja_template
        except ImportError:
            for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
                del sys.modules[name]
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


def limit_memory() -> None:
    """Let allocations fail beyond `MEMORY`, where the system can."""
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    except (ImportError, OSError, ValueError):
        return


def limit_seconds(seconds: float) -> None:
    """End this process after more CPU time, in case the process that started it has ended."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + 2 * seconds) + 2, hard))
    except (ImportError, OSError, ValueError):
        return


def answer(render: Any, line: str) -> dict[str, str]:
    """The rendered text of a request, or why there is none."""
    try:
        request = json.loads(line)
        limit_seconds(request["seconds"])
        given = {"conversations": [request["messages"]], "chat_template": request["template"]}
        text = render(**given, **request["options"])[0][0]
        text.encode("utf-8")
        if len(text) > request["most"]:
            return {"error": f"it writes {len(text)} characters, more than {request['most']} for these messages"}
        return {"text": text}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # A template may raise anything; whatever it is, there is no text.
        name = type(error).__name__
        return {"error": str(error) if name == "TemplateError" else f"{name}: {error}"}


def main() -> None:
    """Answer until the end of input."""
    for stream in (sys.stdin, sys.stdout):  # Whatever the locale; PYTHONUTF8 is ignored here.
        stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.path[:] = json.loads(sys.stdin.readline())
    render = render_function()
    limit_memory()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(render, line), ensure_ascii=False) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
