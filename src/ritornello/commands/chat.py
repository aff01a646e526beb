"""ritornello chat"""

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ritornello.commands import TEXT, option
from ritornello.commands.writing import Writing
from ritornello.config import require

if TYPE_CHECKING:
    from ritornello.engine.chat import Conversation

HELP = """/loops N   go N loops deep from here on; /loops alone says how deep it is
/reset     forget what was said
/exit      end, as Ctrl-D does
Ctrl-C     stop an answer; what was written of it stays"""


@dataclass(frozen=True, kw_only=True)
class Chat(Writing):
    """Talk with a model that was trained on conversations, at any number of loops.

    Each line of standard input is a message; answers go to standard output. A line may be a command: /help names them.
    """

    system: Annotated[str | None, TEXT, option("A message that the conversation begins with.")] = None

    def run(self) -> None:
        self.check_depth()
        loaded = self.load()

        from ritornello.engine.chat import Conversation

        conversation = Conversation(loaded, system=self.system, **self.wishes(loaded))
        if sys.stdin.isatty() and not self.common.quiet:
            print("/help names the commands", file=sys.stderr)
        for line in _lines():
            try:
                if line.startswith("/"):
                    if line.split() == ["/exit"]:
                        return
                    print(self.told(conversation, line), file=sys.stderr)
                elif line.strip():
                    self.answer(conversation, line)
            except (ValueError, ArithmeticError) as error:  # of this line: the next one may be better
                print(f"ritornello: error: {error}", file=sys.stderr)

    def told(self, conversation: "Conversation", line: str) -> str:
        """Do what a command says; returns what to say of it."""
        match line.split():
            case ["/help"]:
                return HELP
            case ["/reset"]:
                conversation.reset()
                return "forgotten"
            case ["/loops"]:
                return f"{conversation.n_loops} loops"
            case ["/loops", number]:
                require(not self.is_calibrated, "/loops", number, "left out: a calibrated exit is for one depth")
                require(number.isdecimal(), "/loops", number, "a number")
                conversation.n_loops = int(number)
                return f"{conversation.n_loops} loops from here on"
            case _:
                raise ValueError(f"{line.split()[0]}: no such command; /help names them")

    def answer(self, conversation: "Conversation", message: str) -> None:
        """Print the answer as it comes."""
        answer = conversation.ask(message)
        if answer.n_dropped:
            print(f"{_turns(answer.n_dropped)} forgotten: no room for more", file=sys.stderr)
        stopped = ""
        with closing(answer.pieces) as pieces:
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                stopped = "stopped; "
        print(flush=True)
        loops = answer.generation.loops
        if loops and not self.common.quiet:
            cut = "cut by --max-tokens; " if answer.generation.reason == "length" else ""
            print(
                f"({stopped}{cut}{len(loops)} tokens, {sum(loops) / len(loops):.1f} loops in the mean)", file=sys.stderr
            )


def _lines() -> Iterator[str]:
    """Of a terminal, where Ctrl-C only throws a line away, or of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - a line can be edited, and the ones before come back
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)", file=sys.stderr)
            continue
        yield line


def _turns(n: int) -> str:
    return "the oldest turn is" if n == 1 else f"the {n} oldest turns are"
