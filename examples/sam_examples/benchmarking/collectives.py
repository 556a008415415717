"""What travels between devices in a compiled program, read from its text.

A collective in a loop counts as often as the loop runs, where the compiler knows how
often that is, or the loop counts up to a constant, as those of `jax.lax.scan` do; else
once.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# What else travels (all-to-all, collective-permute) is counted under its own name.
GATHER, REDUCE = "all-gather", "all-reduce"
_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)
_SHAPE = re.compile(r"(?P<type>pred|[a-z]+(?P<bits>\d+))\[(?P<sizes>[\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# XLA for TPUs leaves them out.
_CONDITION = re.compile(r" while\(.*condition=%([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
# It also spreads a collective over the fusions that it runs beside, each of which has
# a copy that makes all of it.
_SPREAD = re.compile(r'channel_id=(\d+),.*chain_id="(\d+)"')
_CALLED = re.compile(r"(\w+)=(\{[^{}]*\}|%[\w.\-]+)")
_BRANCHES = {"branch_computations", "true_computation", "false_computation"}
_CALLS = {"body", "condition", "calls", "to_apply"} | _BRANCHES


class Traffic(NamedTuple):
    """What the collectives of a program make, on each device.

    Attributes:
      always: bytes by the kind of collective, outside of conditions.
      sometimes: bytes by kind in the branches of conditions, all of them taken.
      number: how many collectives there are in all, however small.
    """

    always: Counter[str]
    sometimes: Counter[str]
    number: int


def traffic(compiled: Any) -> Traffic:
    """The traffic of a compiled function."""
    always, sometimes = Counter[str](), Counter[str]()
    number = 0
    seen = set()
    for line, times, conditional in instructions(compiled.as_text()):
        if found := _COLLECTIVE.search(line):
            if spread := _SPREAD.search(line):
                if spread.groups() in seen:
                    continue
                seen.add(spread.groups())
            count = sometimes if conditional else always
            count[found["kind"]] += times * _num_bytes(found["shapes"])
            number += times
    return Traffic(always, sometimes, number)


def instructions(
    text: str, *, within_fusions: bool = True
) -> Iterator[tuple[str, int, bool]]:
    """What a program executes: the line, how often, and whether under a condition.

    Args:
      text: of the compiled program.
      within_fusions: whether to go into fusions, each of which is one kernel.
    """
    computations, entry = _computations(text)
    waiting = [(entry, 1, False)]
    while waiting:
        name, times, conditional = waiting.pop()
        for line in computations[name]:
            yield line, times, conditional
            if not within_fusions and " fusion(" in line:
                continue
            trips = _trips(line, computations)
            for attribute, callees in _CALLED.findall(line):
                if attribute in _CALLS:
                    repeats = trips if attribute == "body" else 1
                    in_branch = conditional or attribute in _BRANCHES
                    waiting += [
                        (callee, times * repeats, in_branch)
                        for callee in re.findall(r"%([\w.\-]+)", callees)
                    ]


def _trips(line: str, computations: Mapping[str, list[str]]) -> int:
    """How often the loop runs that a line is, 1 if that is unknown."""
    if told := _TRIPS.search(line):
        return int(told[1])
    if loop := _CONDITION.search(line):
        condition = "\n".join(computations[loop[1]])
        bounds = _BOUND.findall(condition)
        if len(bounds) == 1 and "direction=LT" in condition:
            return int(bounds[0])
    return 1


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the first to run."""
    computations = defaultdict(list)
    name = entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
        elif line.startswith(" "):
            computations[name].append(line)
    return computations, entry


def _num_bytes(shapes: str) -> int:
    total = 0
    for shape in _SHAPE.finditer(shapes):
        entries = math.prod(int(size) for size in shape["sizes"].split(",") if size)
        total += entries * max(1, int(shape["bits"] or 8) // 8)
    return total
