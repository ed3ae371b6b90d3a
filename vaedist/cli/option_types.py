"""Types of options: each turns a word of the command line into a value, or says in one line why it cannot."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """The type of an option that is a number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def non_negative_int(text: str) -> int:
    """The type of an option that is a number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def fraction(text: str) -> float:
    """The type of an option that is a share, from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return value


def int_or_range(text: str) -> int | tuple[int, int]:
    """The type of an option that is a number of 1 or more, or two as in 1:4."""
    least, colon, most = text.partition(":")
    if not colon:
        return positive_int(text)
    try:
        span = positive_int(least), positive_int(most)
    except argparse.ArgumentTypeError:
        span = (1, 0)
    if span[0] > span[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, two numbers such as 1:4")
    return span[0] if span[0] == span[1] else span
