"""Refuses wordings that a CUDA engineer has to guess at, where the field has a plain term (docs/writing.md).

    python ci/words.py FILE ...

Every line of a file is read: code, comments, docstrings, error texts, prose. Phrases are found across the line breaks
of a comment, too.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# What is counted, and per what. "tokens a block" is refused only where the phrase ends behind it: "the columns a block
# handles" is English. What is a verb too ("loads a row") is refused only behind a number.
_UNITS = (
    "arguments|bits|blocks|bytes|columns|cycles|elements|entries|experts|files|instructions|kernels|lanes|lines|operations|"
    "positions|products|registers|rows|slots|threads|tiles|tokens|units|warps|weights|words"
)
_VERBS = (
    "accesses|calls|channels|codes|functions|groups|images|launches|layers|loads|pages|passes|ranks|requests|results|"
    "rounds|scales|stages|steps|stores|sums|times|values|waves"
)
_ONE = (
    "access|block|byte|call|channel|code|column|element|entry|expert|function|group|image|instruction|kernel|lane|launch|"
    "layer|matrix|page|pass|position|product|program|rank|register|request|result|round|row|rounding|scale|slot|stage|step|"
    "sum|thread|tile|token|unit|value|warp|warpgroup|weight|word"
)
_PER = (
    "architecture|batch|block|byte|call|channel|cluster|column|device|element|entry|expert|family|group|head|instruction|"
    "kernel|lane|launch|layer|line|multiprocessor|op|operand|page|pass|platform|product|program|Python|rank|request|round|"
    "row|second|slot|SM|stage|step|tensor|thread|tile|token|unit|value|warp|warpgroup|word"
)
_ENDS = r"(?=\s*(?:$|[.,;:)\]|`\"'*\\]|(?:and|or|in|at|on|for|with|where|when|instead|beside|as|from|by|than|to) ))"
_COUNT = r"(?:an?|one|two|three|four|five|six|eight|half|\d+)"

WORDS = [
    (rf"\b(?:{_UNITS}) an? (?:{_PER})\b{_ENDS}", "per"),
    (rf"\b(?:{_COUNT}|many|few|more|fewer) (?:{_VERBS}) an? (?:{_PER})\b{_ENDS}", "per"),
    (rf"\b{_COUNT} (?:{_ONE}) an? (?:{_PER})\b{_ENDS}", "per"),
    (rf"(?<![a-z])(?:{_UNITS}|{_VERBS})_an?_(?:{_PER}|task)s?(?![a-z])", "per"),
    (r"s(?:A|An)(?:Block|Lane|Row|Thread|Tile|Token|Warp)\b", "per"),
    (r"(?<![A-Za-z])(?:[Rr]ivals?|RIVALS?)(?![A-Za-z])", "baseline, peer"),
    (r"(?<![A-Za-z])(?:[Yy]ardsticks?|YARDSTICKS?)(?![a-z])", "reference, baseline, measure"),
    (r"\b[Aa]sk(?:s|ing)? for\b|\bask_for", "load, prefetch, request, require, need"),
    (r"(?<![A-Za-z])[Ww]iden(?:s|ed)?(?![a-z])", "dequantise, upcast, convert"),
    (r"programmatic stream serialization", "programmatic dependent launch (PDL)"),
    (r"\b(?:kernel|grid|predecessor|one before it|it)\b[^.,;:]{0,40}\b(?:run|runs) out\b(?! of)", "drain, finish"),
    (r"'s half of a launch", "say what host or kernel does for PDL"),
    (r"\b[Kk]eeps? house", "clean up, manage"),
    (r"\bthat there (?:is|are) not\b", "that does not exist, is invalid"),
    (r"\b[Ww]hat nobody\b", "unused"),
    (r"\b(?:ha[sv]e?|and) (?:its|their) likes?\b|\band kin\b", "name them, or: similar"),
    (r"\b(?:largest|smallest|most|least) that is right\b", "largest acceptable"),
    (r"\bsecond turn\b", "second wave, second iteration"),
    (r"\bslow way\b", "slow path"),
    (r"\bdear(?:er|est)\b", "more expensive, slower"),
    (r"\bten times what is resident\b", "waves"),
]
_REFUSED = [(re.compile(pattern.replace(" ", " +")), instead) for pattern, instead in WORDS]

# A comment's lines are one text: the break and the next line's leader are blanks of the same length.
_BREAK = re.compile(r"\n[ \t]*(?://+|#+|\*(?!/)|;;)?[ \t]*(?=\S)")

# Texts about the wordings.
ABOUT = ("ci/words.py", "tests/package/test_words.py")


def faults(text: str) -> list[tuple[int, str, str]]:
    """Line, wording and what to write instead, of each wording that is refused."""
    joined = _BREAK.sub(lambda gap: " " * len(gap.group()), text)
    found = []
    for pattern, instead in _REFUSED:
        for match in pattern.finditer(joined):
            found.append((text.count("\n", 0, match.start()) + 1, " ".join(match.group().split()), instead))
    return sorted(found)


def main(paths: list[str]) -> int:
    """Prints what is refused; 1 if anything is."""
    bad = 0
    for path in paths:
        if path in ABOUT:
            continue
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, IsADirectoryError, FileNotFoundError):
            continue
        for line, wording, instead in faults(text):
            print(f"{path}:{line}: {wording!r}: write {instead}")
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
