"""Tables, for a terminal and as markdown."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.cells import OURS, QEMU, Cell, Claim, Sample

Results = Mapping[str, Mapping[str, Sequence[Sample]]]
"""Samples by cell name, then by peer name."""


def progress(text: str) -> None:
    """Tell what has just been measured."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Table:
    """A heading over rows of words; the first column is aligned left."""

    title: str
    heading: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def plain(self) -> str:
        """Return the table for a terminal."""
        lines = [self.heading, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.heading))]
        text = [self.title]
        for line in lines:
            words = [line[0].ljust(widths[0])]
            words += [w.rjust(n) for w, n in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join(words).rstrip())
        return "\n".join(text)

    def markdown(self) -> str:
        """Return the table for a README."""
        rule = ["---", *(["---:"] * (len(self.heading) - 1))]
        lines = [self.heading, tuple(rule), *self.rows]
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([f"{self.title}\n", *rows])


def medians(samples: Sequence[Sample]) -> Sample:
    """Return the median of each figure on its own."""
    return Sample(
        rate=median(s.rate for s in samples),
        throughput=median(s.throughput for s in samples),
        p99=median(s.p99 for s in samples),
        cpu=median(s.cpu for s in samples),
    )


def absolute_table(cells: Sequence[Cell], results: Results) -> Table:
    """Return every server's own figures; spread is (max - min) / median."""
    rows = []
    for cell in cells:
        for peer, samples in results.get(cell.name, {}).items():
            middle = medians(samples)
            rates = [s.rate for s in samples]
            rows.append(
                (
                    cell.name,
                    peer,
                    f"{middle.rate:,.0f}",
                    f"{(max(rates) - min(rates)) / middle.rate:.0%}",
                    f"{middle.throughput / 1e6:,.0f}",
                    f"{middle.p99 * 1e6:,.0f}",
                    f"{middle.cpu * 1e6:.1f}",
                )
            )
    heading = ("cell", "server", "ops/s", "spread", "MB/s", "p99 us", "CPU us/op")
    return Table("Medians", heading, rows)


def ratio_table(
    cells: Sequence[Cell], results: Results, peers: Sequence[str]
) -> tuple[Table, list[str]]:
    """Return our ratios to each peer with their targets, and those missed."""
    rows, missed = [], []
    for cell in cells:
        by_peer = {k: medians(v) for k, v in results.get(cell.name, {}).items()}
        ours = by_peer.get(OURS)
        if ours is None:
            continue
        words = [cell.name, f"{ours.rate:,.0f}"]
        for peer in peers:
            theirs, target = by_peer.get(peer), cell.targets.get(peer)
            if theirs is None:
                words.append("-")
                continue
            ratio = ours.rate / theirs.rate
            word = f"{ratio:.2f}"
            if target is not None:
                word += f" of {target:g} {'ok' if ratio >= target else 'MISSED'}"
                if ratio < target:
                    missed.append(f"{cell.name}: {ratio:.2f} of {target:g} {peer}")
            words.append(word)
        theirs = by_peer.get(QEMU)
        if theirs is None:
            words.append("-")
        else:
            met = ours.cpu <= theirs.cpu or not cell.compare_cpu
            words.append(
                f"{ours.cpu * 1e6:.1f} / {theirs.cpu * 1e6:.1f}"
                f"{'' if not cell.compare_cpu else ' ok' if met else ' MISSED'}"
            )
            if not met:
                missed.append(f"{cell.name}: CPU per operation above {QEMU}'s")
        rows.append(tuple(words))
    heading = ("cell", "ops/s", *(f"x {peer}" for peer in peers), "CPU us/op / qemu")
    title = "Ratios of operations/s, ours to theirs, with the ratio wanted"
    return Table(title, heading, rows), missed


def claim_table(claims: Sequence[Claim]) -> Table:
    """Return the figures that have limits of their own."""
    rows = []
    for claim in claims:
        details = ", ".join(f"{k} {v:,.1f}" for k, v in claim.details.items())
        verdict = "ok" if claim.met else "MISSED"
        rows.append(
            (
                f"{claim.name}: {claim.text}",
                f"{claim.value:,.2f} {claim.unit}",
                f"{claim.limit:,.0f} {claim.unit}",
                verdict,
                details,
            )
        )
    return Table("Limits", ("figure", "value", "limit", "verdict", "also"), rows)
