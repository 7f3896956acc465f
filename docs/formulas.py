"""Turn the Unicode formulas of docstrings, such as u = Σ λ_i g_i, into LaTeX for the built pages.

Docstrings are read in a terminal too, so formulas are written there as text. tex() finds each stretch of a text that
is a formula and hands it, as LaTeX, to a function that marks it as mathematics. What it does not know stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["dollars", "role", "tex"]

SMALL_GREEK = (
    "αalpha βbeta γgamma δdelta εvarepsilon ζzeta ηeta θtheta κkappa λlambda μmu νnu ξxi πpi ρrho σsigma τtau φvarphi"
)
LARGE_GREEK = "χchi ψpsi ωomega ΓGamma ΔDelta ΘTheta ΛLambda ΞXi ΠPi Σsum ΦPhi ΨPsi ΩOmega ℓell"
GREEK = {entry[0]: entry[1:] for entry in f"{SMALL_GREEK} {LARGE_GREEK}".split()}
_NAMED = r"~\sim ≤\le ≥\ge ≈\approx ∝\propto ∈\in ←\leftarrow →\to −- ·\cdot ×\times ∂\partial"
OPERATORS = {c: c for c in "=<>+/"} | {entry[0]: entry[1:] for entry in _NAMED.split()}
SYMBOLS = {"∞": r"\infty", "√": r"\sqrt", "½": r"\tfrac12", "…": r"\dots"}
POWERS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀ", "0123456789+-T", strict=True))
LOWS = dict(zip("₀₁₂₃₄₅₆₇₈₉ᵢⱼₘ", "0123456789ijm", strict=True))
ACCENTS = {"\u0302": r"\hat", "\u0303": r"\tilde"}  # combining, after NFD
COMPOSED = {"ĝ": r"\hat g", "ŵ": r"\hat w", "ŝ": r"\hat s", "ũ": r"\tilde u"}
FUNCTIONS = ("softmax", "argmin", "argmax", "exp", "log", "cos", "max", "min")
PAIRS = {"(": ")", "[": "]", "{": "}", "⟨": "⟩"}

_LETTER = f"[A-Za-z{''.join(GREEK)}{''.join(COMPOSED)}]"
_SCRIPT = rf"(?:[_^](?:\{{[^{{}}]*\}}|\([^()]*(?:\([^()]*\)[^()]*)*\)|-?[A-Za-z0-9{''.join(GREEK)}]+)|['′])"
_ATOM = re.compile(
    rf"(?P<function>(?:{'|'.join(FUNCTIONS)})(?![A-Za-z])|mean(?=[_(]))"
    rf"|(?P<symbol>[∞√½…])|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<letter>{_LETTER})"
)
_AFTER = re.compile(rf"[\u0302\u0303]|[{''.join(POWERS)}]+|[{''.join(LOWS)}]+|{_SCRIPT}")
_WORD = re.compile(r"[A-Za-z][a-zß-ÿ]+(?:-[a-z]+)*")
# What is never a formula: code, doctests, quotations, fields such as :param x:, and words with a hyphen or apostrophe.
_PROSE = re.compile(
    r"``[^`]+``|`[^`]*`|\"[^\"]*\"|>>> .*|->|:[a-z]+(?: [\w*, ]+)?:(?=\s|$)|[A-Za-z]+'s\b|(?:[a-z]\.){2,}|[A-Z][0-9]+"
    r"|[A-Za-z]\w*\.[a-z_]{2,}|[A-Za-z][A-Za-z0-9]+(?:[-'.=_][A-Za-z]{2,}[\w=\"-]*)+|[A-Z]{2,}\w*"
)


def dollars(text: str) -> str:
    """Mark formulas for Markdown: $...$."""
    return tex(text, lambda formula: f"${formula}$")


def role(text: str) -> str:
    """Mark formulas for reStructuredText: :math:`...`."""
    return tex(text, lambda formula: f":math:`{formula}`")


def tex(text: str, mark: Callable[[str], str]) -> str:
    """Return the text with mark(LaTeX) in place of every formula.

    A formula needs a letter that is a variable; "a", "A" and "I" alone are words, and a number alone stays a number.
    """
    out, k = [], 0
    while k < len(text):
        prose = _PROSE.match(text, k) or _plain_word(text, k)
        if prose or text[k].isspace():
            prose = prose or re.compile(r"\s+").match(text, k)
            out.append(prose[0])
            k = prose.end()
            continue
        formula = _Formula(text, k)
        if formula.end > k and formula.counts and (k == 0 or not text[k - 1].isalnum()):
            out.append(mark(formula.latex))
            k = formula.end
        else:
            step = max(1, len(re.match(r"\w*", text[k:])[0]))  # type: ignore[index]
            out.append(text[k : k + step])
            k += step
    return "".join(out)


def _plain_word(text: str, k: int) -> re.Match[str] | None:
    """Return a word of prose at k: two letters or more that are neither a function nor joined variables."""
    word = _WORD.match(text, k)
    return word if word and word[0] not in FUNCTIONS and not _ATOM.match(text, k)["function"] else None


class _Formula:
    """The longest formula that begins at one place: its LaTeX, its end, and whether it is worth being one."""

    def __init__(self, text: str, begin: int, commas: bool = False) -> None:
        self.text, self.end, self.latex, self.counts = text, begin, "", False
        self._parts: list[str] = []
        self._open: list[str] = []
        self._commas, self._variables = commas, 0
        self._read(begin)

    def _read(self, k: int) -> None:
        text, begin = self.text, k
        after_operator = True
        while k < len(text):
            c = text[k]
            if c.isspace():
                if text.startswith("\n\n", k):
                    return
                k += 1
                continue
            spaced = k > begin and text[k - 1].isspace()
            if c in PAIRS and (c != "(" or self._is_group(k, after_operator, spaced)):
                self._open.append(PAIRS[c])
                self._parts.append({"⟨": r"\langle", "{": r"\{"}.get(c, c))
                k, after_operator = k + 1, True
            elif c in PAIRS.values():
                # A half-open interval, [0, 1), closes with the other bracket.
                if not self._open or (self._open[-1] != c and not (self._open[-1] == "]" and c == ")")):
                    return
                self._open.pop()
                self._parts.append({"⟩": r"\rangle", "}": r"\}"}.get(c, c))
                k, after_operator = self._scripts(k + 1), False
            elif c in "‖|":
                side = "Vert" if c == "‖" else "vert"
                closing = f"\\r{side}" in self._open and not after_operator
                if closing and self._open[-1] != f"\\r{side}":
                    return
                if closing:
                    self._parts.append(self._open.pop())
                    k = self._scripts(k + 1)
                elif c == "|" and spaced and text[k + 1 : k + 2].isspace():
                    return  # the bar of a table
                else:
                    self._open.append(f"\\r{side}")
                    self._parts.append(f"\\l{side}")
                    k += 1
                after_operator = not closing
            elif c in ",:" and (self._open or self._commas):
                self._parts.append(r"\colon" if c == ":" else ",")
                k, after_operator = k + 1, True
            elif c in OPERATORS:
                self._parts.append(OPERATORS[c])
                k, after_operator = k + 1, True
                continue  # a formula does not end with an operator
            elif self._open and self._begins_word(k) and (word := _plain_word(text, k)):
                if self._open[-1] not in ")}":
                    return
                words = re.compile(r"[A-Za-z]+(?:\s+[A-Za-z]+)*(?=\s*[)}])").match(text, k) or word
                self._parts.append(_words(words[0]) if after_operator else rf"\ {_words(words[0])}")
                k, after_operator = words.end(), False
            elif (
                (atom := _ATOM.match(text, k))
                and not _PROSE.match(text, k)
                and not (self._begins_word(k) and _plain_word(text, k))
            ):
                if not self._open and atom[0] in "aeACIX" and not re.match(r"[_^²]", text[atom.end() :]):
                    joined = after_operator and k > begin
                    follows = re.match(r"\s*[=<>≤≥∝←→+−·/⁺ᵀ]", text[atom.end() :])
                    if not joined and not follows and not (k > begin and not spaced):
                        return
                k, after_operator = self._atom(atom), False
            else:
                return
            if not self._open:
                self._take(k)

    def _begins_word(self, k: int) -> bool:
        """Tell "Gr" in λᵀGr, two variables, from a word."""
        return k == 0 or self.text[k - 1] not in POWERS

    def _is_group(self, k: int, after_operator: bool, spaced: bool) -> bool:
        """Tell "(P − ½)", a part of the formula, from "(stationary points)", a remark."""
        inside = re.match(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)", self.text[k:])
        if inside is None:
            return False
        wordy = any(_plain_word(inside[1], word.start()) for word in _WORD.finditer(inside[1])) or '"' in inside[1]
        if self._parts and after_operator:
            return True
        return not wordy and not (spaced and re.search(r"[=<>≤≥]", inside[1])) and bool(inside[1].strip())

    def _atom(self, atom: re.Match[str]) -> int:
        k = atom.end()
        if name := atom["function"]:
            bare = {"argmin", "argmax"}
            self._parts.append(
                rf"\operatorname*{{{name}}}" if name in bare else rf"\{name}" if name not in ("softmax", "mean")
                else rf"\operatorname{{{name}}}"
            )  # fmt: skip
        elif symbol := atom["symbol"]:
            if symbol == "√":
                return self._root(k)
            self._parts.append(SYMBOLS[symbol])
            self._variables += symbol == "∞"
        elif number := atom["number"]:
            base, _, power = number.partition("e")
            self._parts.append(rf"{base} \cdot 10^{{{power}}}" if power else base)
        else:
            letter = atom["letter"]
            accent = ACCENTS.get(self.text[k : k + 1])
            name = COMPOSED.get(letter) or (f"\\{GREEK[letter]}" if letter in GREEK else letter)
            self._parts.append(rf"{accent}{{{name}}}" if accent else name)
            self._variables += 1
            k += bool(accent)
        return self._scripts(k)

    def _root(self, k: int) -> int:
        """Read what stands below a root: a group, or one atom."""
        inner = re.match(r"\(([^()]*(?:\([^()]*\)[^()]*)*)\)", self.text[k:])
        if inner:
            inside, length = inner[1], inner.end()
        else:
            atom = re.match(rf"(?:Σ\s*)?{_LETTER}[\u0302\u0303]?(?:{_AFTER.pattern})*|\d+", self.text[k:])
            if atom is None or _WORD.match(self.text, k):
                self._parts.append(r"\surd")
                return k
            inside, length = atom[0], atom.end()
        self._parts.append(rf"\sqrt{{{_whole(inside)}}}")
        self._variables += 1
        return k + length

    def _scripts(self, k: int) -> int:
        """Read what is attached to an atom or a bracket: powers, indices, primes."""
        while script := _AFTER.match(self.text, k):
            raw = script[0]
            if raw[0] in POWERS:
                self._attach(f"^{{{''.join(POWERS[c] for c in raw)}}}")
            elif raw[0] in LOWS:
                self._attach(f"_{{{''.join(LOWS[c] for c in raw)}}}")
            elif raw[0] in "'′":
                # An apostrophe before an s belongs to a word.
                if self.text[k + 1 : k + 2].isalpha():
                    return k
                self._attach("'")
            elif raw[0] in ACCENTS:
                self._parts[-1] = rf"{ACCENTS[raw[0]]}{{{self._parts[-1]}}}"
            else:
                content = raw[2:-1] if raw[1] in "({" else raw[1:]
                upright = len(content) > 1 and content.isalpha() and content.isupper()
                content = rf"\text{{{content}}}" if upright else _whole(content)
                self._attach(f"{raw[0]}{{{content}}}")
            k = script.end()
        return k

    def _attach(self, script: str) -> None:
        self._parts[-1] += script

    def _take(self, k: int) -> None:
        self.end, self.latex = k, " ".join(self._parts)
        self.counts = self._variables > 0


def _whole(text: str) -> str:
    """Return the LaTeX of a text that is a formula from end to end."""
    letters = text.isalnum() and not text.isdigit()
    formula = _Formula(" ".join(text) if letters else text, 0, commas=True)
    return formula.latex or text


def _words(text: str) -> str:
    """Return words inside of a formula as upright text, single letters among them as variables."""
    pieces = re.split(r"\s+(?=[b-z]\b)|(?<=\b[b-z])\s+", text)
    return r"\ ".join(rf"\text{{{' '.join(piece.split())}}}" if len(piece) > 1 else piece for piece in pieces)
