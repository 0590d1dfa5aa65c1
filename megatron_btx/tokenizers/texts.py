"""Texts on which two tokenizers are compared: where tokenizers are known to differ, and some of many scripts."""

from __future__ import annotations

from collections.abc import Iterable

_BLANKS = (
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", " \n ", "\n ", " \n", "\t\t", "\u00a0", "\u3000", "\u2003a",
    " a", "  a", "   a", "a ", "a  ", "a   ", "a b", "a  b", "a   b", "a    b", "\ta", "a\t", "a\tb", "a \t b",
    "a\nb", "a\n\nb", "a\n\n\nb", "a \nb", "a\n b", "a \n b", "a\r\nb", "a\r\n\r\nb", "\na", "a\n", "\r\na", "a\u00a0b",
    "a\u3000b", "a\u2028b", "a\x0bb", "a\x0cb", "  two at the beginning and two at the end  ",
)  # fmt: skip
_CHARACTERS = (
    "\u2581", "\u2581a", "a\u2581", "a\u2581b", " \u2581 ", "\u2581\u2581", "\ufeffa", "a\ufeffb", "a\u200bb",
    "a\u200db", "a\u00adb", "\ufffd", "a\x00b", "\x01\x1f\x7f", "\u0301", "a\u0301", "\U000e0041", "\ue000",
    "\u00e9t\u00e9", "e\u0301te\u0301", "E\u0301TE\u0301 \u00c9", "\u212b \u00c5 A\u030a", "\u1e9b",
    "\uff21\uff22\uff23 \uff11", "\ufb01ne \ufb02at", "\u00bd \u00b2 \u2460", "\u2126 \u03a9", "\u1e9e \u00df STRASSE",
    "\u0130stanbul \u0131", "\u2163", "\uff76\uff9e\uff8a\uff9f", "\ud55c\uae00 \u1112\u1161\u11ab",
    "\u00a8\u00b4\u00b8",
)  # fmt: skip
_EMOJI = (
    "\U0001f600", " \U0001f600 ", "a\U0001f600b", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f3f3\ufe0f\u200d\U0001f308", "1\ufe0f\u20e3",
)  # fmt: skip
_NUMBERS = (
    "0", "7", "12", "123", "1234", "12345678901234567890", "3.14159", "1,000,000", "-5", "1e-6", "0x1F", "2026-11-25",
    "12:30:45", "50%", "$9.99", "1st 2nd 3rd", " 12 + 34 = 46", "x1y22z333", "\u0661\u0662\u0663", "\u0967\u0968",
)  # fmt: skip
_WORDS = (
    "a", "The", "the", " the", "Hello, world!", "don't I'LL we've it's", "DON'T", "CamelCase snake_case kebab-case",
    "http://example.org/a?b=c&d=%20", "name@example.org", "...", "!!!???", "\u201cquoted\u201d \u2018text\u2019",
    "em\u2014dash en\u2013dash", "a/b\\c|d", "*bold* _it_ `code`", "# Heading", "- item\n- item", "`` '' \"\"",
    "[INST] question [/INST]", "{{ template }}", "a" * 300, "ab" * 150, "=" * 80, "antidisestablishmentarianism",
    "one two three four five six seven eight nine ten", "UPPER lower MiXeD", "<tag attr='1'>x</tag>",
)  # fmt: skip
_CODE = (
    "def f(x):\n    return x + 1\n", "if (a && b) {\n\treturn c[0];\n}\n", "for i in range(10):\n        print(i)\n",
    "SELECT * FROM t WHERE a = 'b';", "x = [1, 2, 3]\r\ny = {}\r\n", "#include <stdio.h>\nint main() { return 0; }",
    "\\frac{1}{2} + \\sqrt{x^2}", "    indented\n        more\n",
)  # fmt: skip
_SCRIPTS = (
    "Grüße aus Köln", "Ça va très bien", "Zążółć gęślą",
    "Tiếng Việt", "Привет, мир", "Καλημέρα",
    "שלום עולם", "مرحبا بالعالم",
    "नमस्ते", "হ্যালো", "வணக்கம்",
    "สวัสดีชาวโลก", "你好，世界。",
    "こんにちは世界", "カタカナ", "안녕하세요", "გამარჯობა",
    "Հայերեն", "አማርኛ", "𐌰𐌱", "𝓐𝓑", "𠀀𠀁",
)  # fmt: skip
_FIXED = (*_BLANKS, *_CHARACTERS, *_EMOJI, *_NUMBERS, *_WORDS, *_CODE, *_SCRIPTS)
_TOKENS_AT_MOST = 12


def texts(tokens: Iterable[str], at_most: int = _TOKENS_AT_MOST) -> list[str]:
    """The texts to compare tokenizers on, with the first tokens that have a meaning of their own in a text."""
    found = list(_FIXED)
    for token in list(dict.fromkeys(tokens))[:at_most]:
        found += [token, f"a{token}b", f"a {token} b", f"{token}{token} ", f"\n{token}\n"]
    return found
