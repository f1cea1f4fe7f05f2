"""A version's lineage as a person reads it: a tree, newest version first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.tree import Tree

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output


def lineage_tree(model: str, answer: pb.GetLineageResponse) -> Tree:
    """Each version with its data contract, its round, its releases, and their rollouts."""
    tree = Tree(f"Lineage of {model} {answer.versions[0].number}")
    for version, step in zip(answer.versions, answer.steps, strict=True):
        _add(tree, version, step)
    return tree


def _add(tree: Tree, version: pb.Version, step: pb.LineageStep) -> None:
    parent = f", from version {version.parent}" if version.parent else ""
    made = f"round {version.round} of {version.task}" if version.task else f"added by {version.registered_by}"
    branch = tree.add(f"version {version.number} ({version.state}{parent}): {made}, {_instant(version.created_at_ms)}")
    branch.add(f"data     {_contract(json.loads(step.data_contract))}")
    if step.HasField("round"):
        branch.add(f"round    {_round(step.round)}")
        branch.add(f"strategy {version.strategy}; plan {output.plan(json.loads(version.plan_json))}")
        branch.add(f"verdict  {version.verdict or '–'}; accuracy {output.share(version)}")
    for release in step.releases:
        back = f", the way back to release {release.content_of}" if release.content_of else ""
        twig = branch.add(f"release  {release.number} on {release.channel}{back}, {_instant(release.issued_at_ms)}")
        _add_events(twig, release.events)
        for rollout in release.rollouts:
            _add_rollout(twig, rollout)


def _add_rollout(twig: Tree, rollout: pb.LineageRollout) -> None:
    counts = ", ".join(f"{it.devices} {it.outcome}" for it in rollout.counts) or "offered to nobody"
    leaf = twig.add(f"rollout {rollout.id} ({rollout.stage}): {counts}")
    approval = f"approved by {rollout.approved_by} ({rollout.subject[:12]})" if rollout.approved_by else "not approved"
    leaf.add(f"written by {rollout.author}, {approval}")
    _add_events(leaf, rollout.events)


def _add_events(twig: Tree, events: Iterable[pb.LineageEvent]) -> None:
    for event in events:
        twig.add(f"{_instant(event.at_ms)}  {event.actor}  {event.action}  (audit row {event.audit_row})")


def _contract(contract: dict[str, Any]) -> str:
    shapes = [_tensor(tensor) for tensor in (*contract["inputs"], *contract["targets"])]
    terms = [f"{len(contract['labels'])} labels"] if contract["labels"] else []
    if "population" in contract:
        seen = "only sums of updates are known" if contract["updates_private"] else "single updates are seen"
        terms += [
            f"population {contract['population']}",
            f"at least {contract['least_examples']} examples on each of {contract['least_devices']} devices",
            seen,
        ]
    return "; ".join([", ".join(shapes), *terms])


def _tensor(tensor: dict[str, Any]) -> str:
    sizes = ", ".join("n" if size is None else str(size) for size in tensor["shape"])
    return f"{tensor['name']} {tensor['dtype']}[{sizes}]"


def _round(found: pb.Round) -> str:
    return f"{found.reports} of {found.assigned} devices, base version {found.base_version}, {found.state}"


def _instant(milliseconds: int) -> str:
    return f"{output.instant(milliseconds)} UTC"
