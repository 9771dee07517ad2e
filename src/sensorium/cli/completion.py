"""Scripts that complete commands, flags and their choices in a shell, made from the command line's own parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

COMMAND = "sensorium"


@dataclass(frozen=True, slots=True)
class Word:
    """A flag or a command; `choices` are the values of a flag that has some."""

    text: str
    help: str
    choices: tuple[str, ...] = ()
    takes_value: bool = False


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """For bash, zsh or fish."""
    commands = dict(_commands(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _commands(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, list[Word]]]:
    """(command, what may follow it) of the program and of all commands, those of commands too."""
    own = list(_flags(parser))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                own.append(Word(name, helps.get(name, "")))
                yield from _commands(inner, f"{path} {name}".strip())
        elif not action.option_strings and action.choices:
            own += [Word(str(choice), "") for choice in action.choices]
    yield path, own


def _flags(parser: argparse.ArgumentParser) -> Iterator[Word]:
    for action in parser._actions:
        if action.help is argparse.SUPPRESS:
            continue
        help = (action.help or "").replace("%%", "%").partition(". ")[0].rstrip(".")
        choices = tuple(map(str, action.choices or ())) if action.option_strings else ()
        for option in action.option_strings:
            yield Word(option, help, choices, action.nargs != 0)


def _bash(commands: dict[str, list[Word]]) -> str:
    cases = "".join(f"    {_quoted(path)}) words={_quoted(_texts(words))} ;;\n" for path, words in commands.items())
    choices = {(path, word.text): word.choices for path, words in commands.items() for word in words if word.choices}
    values = "".join(
        f"    {_quoted(f'{path} {flag}'.strip())}) words={_quoted(' '.join(of))} ;;\n"
        for (path, flag), of in choices.items()
    )
    return f"""_{COMMAND}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" path="" words="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "${{path:+$path }}$word" in
      {"|".join(_quoted(path) for path in commands if path)}) path="${{path:+$path }}$word" ;;
    esac
  done
  case "${{path:+$path }}$previous" in
{values}    *) ;;
  esac
  if [ -z "$words" ]; then
    case "$path" in
{cases}    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _{COMMAND} {COMMAND}
"""


def _zsh(commands: dict[str, list[Word]]) -> str:
    """By bash's function, which zsh can run."""
    return f"#compdef {COMMAND}\nautoload -U +X bashcompinit && bashcompinit\n{_bash(commands)}"


def _fish(commands: dict[str, list[Word]]) -> str:
    lines = [f"complete -c {COMMAND} -f"]
    for path, words in commands.items():
        outer = sorted({other.split()[0] for other in commands if " " in other and other.split()[-1] == path})
        seen = "".join(f"not __fish_seen_subcommand_from {word}; and " for word in outer)
        seen += "".join(f"__fish_seen_subcommand_from {word}; and " for word in path.split())
        inner = sorted(
            {
                other.split()[len(path.split())]
                for other in commands
                if other and other != path and f"{other} ".startswith(f"{path} ".lstrip())
            }
        )
        here = f"{seen}not __fish_seen_subcommand_from {' '.join(inner)}" if inner else seen.removesuffix("; and ")
        for word in words:
            lines.append(f"complete -c {COMMAND} -n {_quoted(here or 'true')} {_fish_word(word)}")
        if not inner and path:
            lines.append(f"complete -c {COMMAND} -n {_quoted(here)} -F")
    return "\n".join(lines) + "\n"


def _fish_word(word: Word) -> str:
    told = f" -d {_quoted(word.help)}" if word.help else ""
    if not word.text.startswith("-"):
        return f"-a {_quoted(word.text)}{told}"
    name = f"-l {word.text[2:]}" if word.text.startswith("--") else f"-s {word.text[1:]}"
    values = f" -x -a {_quoted(' '.join(word.choices))}" if word.choices else " -r" if word.takes_value else ""
    return name + values + told


def _texts(words: list[Word]) -> str:
    return " ".join(word.text for word in words)


def _quoted(text: str) -> str:
    """For all three shells: in single quotes, without any in it."""
    return "'" + text.replace("\\", "").replace("'", "’") + "'"
