"""Answers that are words: a parser of mathematics multiplies their letters, so that AB is BA and
tea is eat. Here they are compared as words.

A literal is an answer that is nothing but words (`no solution`, `B`, `AB`), or a date. Case, white
space, LaTeX's \\text{} and punctuation around it do not count.
"""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s{}$]))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
    r"\s*\{([^{}]*)\}"
)
SPACING = re.compile(r"\\[()\[\],;:! ]|~")  # LaTeX's spaces, and the marks of its formulas
AROUND = " \t\r\n.,:;!?\"'`*_$()[]{}"
WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019][^\W\d_]+|-[^\W\d_]{3,})*")
DATE = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}|\d{4}/\d{1,2}/\d{1,2}"
    r"|\d{1,2}/\d{1,2}/\d{4}|\d{1,2}\.\d{1,2}\.\d{4}|\d{1,2}-\d{1,2}-\d{4}"
)
FORMULA = re.compile(r"\$([^$\n]+)\$")
ANSWER = re.compile(r"(?i:\banswer)(?:\*\*)?\s*(?:is|:|=)\s*:?\s*([^\n]+)")
# a letter that something closes: (B) because ...
CHOICE = re.compile(r"[\s(\[*_{]*([A-Z])[)\]}.:,*]")
LONGEST_PRODUCT = 3  # letters that could be variables side by side


def last_box(text: str) -> str | None:
    """What stands in the last \\boxed{} that is closed, None without one."""
    closing = braces(text)
    for box in reversed(list(BOX.finditer(text))):
        if box[1]:
            return box[1]
        opening = box.end() - 1
        if opening in closing:
            return text[box.end() : closing[opening]]
    return None


def braces(text: str) -> dict[int, int]:
    """{position of an opening brace: of the one that closes it}; escaped braces are text."""
    closing = {}
    waiting = []
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            waiting.append(brace.start())
        elif brace[0] == "}" and waiting:
            closing[waiting.pop()] = brace.start()
    return closing


def literal(text: str) -> str | None:
    """The normal form of an answer that is a word, several, or a date; None for anything else."""
    bare = stripped(text)
    if WORDS.fullmatch(bare) or DATE.fullmatch(bare):
        return bare.casefold()
    return None


def is_date(text: str) -> bool:
    return DATE.fullmatch(stripped(text)) is not None


def could_be_product(word: str) -> bool:
    """Whether a literal may be meant as variables side by side, such as xy."""
    return word.isalpha() and len(word) <= LONGEST_PRODUCT


def stripped(text: str) -> str:
    text = SPACING.sub(" ", text)
    previous = None
    while previous != text:
        previous = text
        text = WRAPPER.sub(r"\1", text).strip(AROUND)
    return " ".join(text.split())


def said(completion: str) -> list[str]:
    """What a completion may mean as its answer in words: the last box; without one, what follows
    the last `answer is`, or all of it, or its last formula.
    """
    box = last_box(completion)
    if box is not None:
        return [box]
    formulas = FORMULA.findall(completion)[-1:]
    found = ANSWER.findall(completion)
    if not found:
        return [completion, *formulas]
    sentence = re.split(r"[.!?](?:\s|$)", found[-1])[0]
    choice = CHOICE.match(found[-1])
    choices = [choice[1]] if choice else []
    return [sentence, *choices, *formulas]
