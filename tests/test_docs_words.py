"""Commands that pages, helps and messages show can be given: their verbs are there, and take these options."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Iterator

import click
import pytest

import umbel_client.cli
import umbel_models.cli
import umbel_server.cli
import umbel_simulations.cli
from tests.docs_runner import SHELLS, Block, blocks
from tests.test_docs_links import PAGES, SOURCES

Command = click.Command | argparse.ArgumentParser
DEVICE = umbel_client.cli._parser()
PROGRAMS: dict[str, Command] = {
    "umbel": umbel_server.cli.program(),
    "umbel-compile": umbel_models.cli.program(),
    "umbel-simulate": umbel_simulations.cli.program(),
    "umbel-device": DEVICE,
}
READ = [page for page in PAGES if page.name != "CHANGELOG.md"]  # that tells of days when commands were others
MENTION = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`\n]+)`")
EXAMPLE = re.compile(rf"^(?:Example: `?|\d\. | +)((?:{'|'.join(PROGRAMS)}) .*?)`?(?:   .*)?$", re.MULTILINE)
_PUNCTUATION = frozenset("();<>|&")


def typed(page: str) -> Iterator[list[str]]:
    """The command lines in a page's blocks, split into words as a shell does."""
    indented = re.findall(
        r"^    (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    for script in ("\n".join(indented), *map(script_of, blocks(page))):
        for line in script.replace("\\\n", "").splitlines():
            yield from commands_of(line)


def script_of(block: Block) -> str:
    if block.language == "console":
        return "\n".join(line[2:] for line in block.text.splitlines() if line.startswith(("$ ", "> ")))
    return block.text if block.language in ("", *SHELLS) else ""


def commands_of(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for word in (*lexer, ";"):
        if not _PUNCTUATION.issuperset(word):
            words.append(word)
            continue
        if word.startswith(">") and words[-1:] == ["2"]:  # of 2>&1
            words.pop()
        if words and words[0] in PROGRAMS and "$@" not in words:
            yield words
        words = []


def refusal(words: list[str]) -> str:
    """What the program says to such a command line, without running it."""
    command, rest = PROGRAMS[words[0]], words[1:]
    if isinstance(command, argparse.ArgumentParser):
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
            command.parse_args(rest)
        return said.getvalue()
    try:
        while isinstance(command, click.Group):
            _, found, rest = command.resolve_command(click.Context(command), rest)
            assert found
            command = found
        command.make_context(words[0], rest)
    except click.UsageError as error:
        return error.format_message()
    return ""


def test_what_pages_show_to_type_can_be_typed() -> None:
    wrong = {}
    for page in READ:
        lines = typed(page.read_text("utf-8"))
        wrong |= {f"{page.name}: {shlex.join(words)}": said for words in lines if (said := refusal(words))}
    assert not wrong


def verbs_and_options(command: Command) -> tuple[dict[str, Command], set[str]]:
    if isinstance(command, argparse.ArgumentParser):
        groups = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: verb for group in groups for name, verb in group.choices.items()}, {
            *command._option_string_actions
        }
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return dict(command.commands) if isinstance(command, click.Group) else {}, {*options, "--help"}


def unknown(mention: str) -> list[str]:
    """Words of a mention, such as `umbel keys rotate ROLE KEY [--draft FILE]`, that the program doesn't know."""
    name, *words = re.sub(r"[\[\]]|\.$", " ", mention).split()
    verbs, known = verbs_and_options(PROGRAMS[name])
    found = []
    for before, word in zip(["", *words], words, strict=False):
        if word in verbs:
            verbs, more = verbs_and_options(verbs[word])
            known |= more
            continue
        verb_is_due = bool(verbs) and not before.startswith("-")
        if (verb_is_due and re.fullmatch(r"[a-z][a-z-]*", word)) or (
            word.startswith("-") and word.partition("=")[0] not in known
        ):
            found.append(word)
    return found


def test_what_pages_and_messages_name_is_there() -> None:
    wrong = {}
    for page in (*READ, *SOURCES):
        mentions = MENTION.findall(page.read_text("utf-8"))
        wrong |= {f"{page.name}: {mention}": words for mention in mentions if (words := unknown(mention))}
    assert not wrong


def helps(command: Command) -> Iterator[str]:
    if isinstance(command, argparse.ArgumentParser):
        yield f"{command.description}\n{command.epilog}"
    else:
        yield command.help or ""
    for verb in verbs_and_options(command)[0].values():
        yield from helps(verb)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_examples_in_a_programs_help_can_be_typed(program: str) -> None:
    examples = [line for text in helps(PROGRAMS[program]) for line in EXAMPLE.findall(text)]
    wrong = {line: said for line in examples for words in commands_of(line) if (said := refusal(words))}
    assert examples
    assert not wrong
