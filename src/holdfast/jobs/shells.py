"""Shells between a scheduler and a program: which of them keep SIGTERM to themselves.

A shell that waits for a command does not pass signals on. It dies of SIGTERM, or, as the
first process of a container, never even gets it; a trap runs only once the command has ended.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SHELLS = frozenset(("sh", "bash", "dash", "ash", "zsh", "ksh", "mksh", "fish"))
# Options with a word of their own.
_WITH_WORD = frozenset(("-o", "+o", "-O", "+O", "--rcfile", "--init-file"))
_KEYWORDS = frozenset(
    ("fi", "done", "esac", "wait", "exit", "exec", "if", "for", "while", "until", "case", "time")
)
_EXEC = re.compile(r"(?:^|[;&|]\s*)exec\s+(?![<>0-9])", re.MULTILINE)
_BACKGROUND = re.compile(r"(?<![&>])&(?![&>])")
_TRAP = re.compile(r"(?:^|[;&|]\s*)trap\s", re.MULTILINE)


def is_shell(argv: Sequence[str]) -> bool:
    """
    >>> is_shell(["-bash"]), is_shell(["/bin/sh", "-c", "true"]), is_shell(["python"])
    (True, True, False)
    """
    return bool(argv) and program(argv) in _SHELLS


def program(argv: Sequence[str]) -> str:
    """The name of what was started, as people know it."""
    return argv[0].rpartition("/")[2].removeprefix("-") if argv else ""


def script_of(argv: Sequence[str]) -> tuple[str, str]:
    """(the text after `-c`, the path of the script) that a shell executes; an interactive
    one, and what is no shell, has neither.

    >>> script_of(["bash", "-euo", "pipefail", "train.sh", "7"])
    ('', 'train.sh')
    >>> script_of(["sh", "-ec", "python train.py"])
    ('python train.py', '')
    """
    if not is_shell(argv):
        return "", ""
    words = iter(argv[1:])
    command = False
    for word in words:
        if word in ("-", "--"):
            word = next(words, "")
            return (word, "") if command else ("", word)
        if word[:1] not in ("-", "+"):
            return (word, "") if command else ("", word)
        if word.startswith("--"):
            if word in _WITH_WORD:
                next(words, "")
            continue
        command = command or (word[0] == "-" and "c" in word)
        if word in _WITH_WORD or (len(word) > 2 and word[-1] in "oO"):
            next(words, "")
    return "", ""


def is_interactive(argv: Sequence[str]) -> bool:
    """A shell that takes its commands from a person (or from a pipe)."""
    return is_shell(argv) and script_of(argv) == ("", "")


def hands_over(script: str) -> bool:
    """Whether the script ends in a command that takes the shell's place."""
    return bool(_EXEC.search(_code(script)))


def passes_on(script: str) -> bool:
    """Whether it traps signals and waits for a command in the background, as it must to
    pass them on."""
    code = _code(script)
    return bool(_TRAP.search(code) and _BACKGROUND.search(code))


def with_exec(script: str) -> str:
    """The last line of `script`, so written that its command takes the shell's place; "" if
    that cannot be told.

    >>> with_exec("set -e\\ncd /app && LR=0.1 python train.py  # go")
    'cd /app && LR=0.1 exec python train.py'
    >>> with_exec("python train.py | tee log")
    ''
    """
    lines = [line.strip() for line in _code(script).replace("\\\n", " ").splitlines()]
    line = next((line for line in reversed(lines) if line), "")
    start = max(line.rfind("&&") + 2 if "&&" in line else 0, line.rfind(";") + 1)
    found = re.match(r"(?:\s*\w+=\S*)*\s*", line[start:])
    start += found.end() if found else 0
    command = line[start:]
    first = re.match(r"[\w./~$+-]+(?=\s|$)", command)
    if first is None or first[0] in _KEYWORDS or re.search(r"[|()`\"']|&$|<<", line[start:]):
        return ""
    return f"{line[:start]}exec {command}"


def _code(script: str) -> str:
    """Without comments."""
    return re.sub(r"(?m)(?:^|(?<=\s))#.*$", "", script)
