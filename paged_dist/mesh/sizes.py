"""Sizes of the mesh axes, from those asked for and the number of devices; where those do not fit, sizes that do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from paged_dist._errors import bad_value


def infer_sizes(
    num_devices: int,
    *,
    data: int | None = None,
    context: int | None = None,
    model: int | None = None,
    num_kv_heads: int | None = None,
    model_parallelism: int | None = None,
    slice_devices: int | None = None,
) -> tuple[int, int, int]:
    """The (data, context, model) sizes that `make_pod_mesh` builds over `num_devices` devices; same arguments.

    `slice_devices` is given where there are several slices: the devices of one, which context x model must divide, for
    only data is split over slices.
    """
    asked = dict(data=data, context=context, model=model, num_kv_heads=num_kv_heads)
    asked |= dict(model_parallelism=model_parallelism, slice_devices=slice_devices)
    found = _sizes_of(num_devices, **asked)
    if isinstance(found, tuple):
        return found
    works = found.works
    if works is None or (found.change and not isinstance(_sizes_of(num_devices, **{**asked, **found.change}), tuple)):
        works = _sizes_near(num_devices, asked, found.argument)
    raise bad_value(found.argument, found.value, found.rule, works)


@dataclasses.dataclass(frozen=True)
class _Unfit:
    """Why sizes do not fit, as the parts of a `bad_value`.

    Attributes:
      works: what to pass instead, if the rule knows it.
      change: the sizes that `works` stands for: `works` is said only if they fit. None: it needs no trial.
    """

    argument: str
    value: int
    rule: str
    works: str | None = None
    change: Mapping[str, int | None] | None = None


def _sizes_of(
    num_devices: int,
    *,
    data: int | None,
    context: int | None,
    model: int | None,
    num_kv_heads: int | None,
    model_parallelism: int | None,
    slice_devices: int | None,
) -> tuple[int, int, int] | _Unfit:
    """The sizes that `infer_sizes` returns, or why none fit."""
    if model_parallelism is not None:
        if model is None:
            to_split = model_parallelism
            if context is not None:
                if model_parallelism % context:
                    return _Unfit("context", context, f"must divide model_parallelism {model_parallelism}")
                to_split = model_parallelism // context
            model = to_split if num_kv_heads is None else math.gcd(to_split, num_kv_heads)
        if model_parallelism % model:
            return _Unfit("model", model, f"must divide model_parallelism {model_parallelism}")
        rest = model_parallelism // model
        if context is not None and context != rest:
            rule = f"model {model} x context must be model_parallelism {model_parallelism}"
            return _Unfit("context", context, rule, f"leave it out, or pass {rest}", {"context": rest})
        context = rest
    model, context = model or 1, context or 1
    group = context * model
    if num_kv_heads is not None and num_kv_heads % model:
        rule = f"must divide num_kv_heads {num_kv_heads}, for heads are never repeated"
        less = math.gcd(model, num_kv_heads)
        change = {"model": less, "context": group // less}
        return _Unfit("model", model, rule, f"model={less}, context={group // less} uses as many devices", change)
    if num_devices % group:
        argument = "context x model" if context > 1 else "model"
        return _Unfit(argument, group, f"must divide the number of devices, {num_devices}")
    if slice_devices is not None and slice_devices % group:
        rule = f"must divide a slice's {slice_devices} devices, for only data is split over slices"
        return _Unfit("context x model" if context > 1 else "model", group, rule)
    if data is None:
        data = num_devices // group
    if data * group != num_devices:
        rule = f"data x context x model = {data} x {context} x {model} = {data * group} must be the number of devices, "
        works = f"data={num_devices // group} (or None) works with context {context} and model {model}"
        works += f", and so does a list of {data * group} devices" if data * group < num_devices else ""
        return _Unfit("data", data, f"{rule}{num_devices}", works)
    return data, context, model


def _sizes_near(num_devices: int, asked: dict[str, int | None], argument: str) -> str:
    """What works in place of the sizes `asked`: other values of `argument` alone, else the nearest sizes of all."""
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    wanted = asked.get(argument)
    if wanted is not None:
        alone = [d for d in divisors if isinstance(_sizes_of(num_devices, **asked | {argument: d}), tuple)]
        if near := [d for d in alone if d < wanted][-2:] + [d for d in alone if d > wanted][:2]:
            *most, last = map(str, near)
            return f"{argument}={', '.join(most)} or {last} works" if most else f"{argument}={last} works"

    def changed(model: int, context: int) -> dict[str, int]:
        sizes = {"model_parallelism": model * context, "model": model, "context": context}
        sizes["data"] = num_devices // (model * context)
        return {name: size for name, size in sizes.items() if asked[name] not in (None, size)}

    def distance(change: dict[str, int]) -> tuple[int, float]:
        return len(change), sum(abs(math.log(size / (asked[name] or size))) for name, size in change.items())

    options = [
        changed(model, context)
        for model in divisors
        if (asked["num_kv_heads"] or model) % model == 0
        for context in divisors
        if num_devices // model % context == 0
    ]
    # An option names only the sizes that change. The others are inferred, maybe to others than the option's: try each.
    tried = (c for c in sorted(options, key=distance) if isinstance(_sizes_of(num_devices, **asked | c), tuple))
    return f"{', '.join(f'{name}={size}' for name, size in next(tried).items())} works"


def divisors_near(total: int, wanted: int) -> str:
    """What would work in place of `wanted`, which does not divide `total`: the nearest divisors."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in divisors if d < wanted][-2:]
    above = [d for d in divisors if d > wanted][:2]
    return f"the nearest divisors of {total} are {', '.join(map(str, below + above))}"
