"""Models bound to one bank as a plan says, and back to plain layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..nn.bank import SuperWeightBank
from ..nn.superweight import SuperConv2d, SuperLinear
from ..surgery import from_bank, replace
from ..weights import count_parameters
from .planning import Models, as_models
from .plans import Plan

_PLAIN = (nn.Conv2d, nn.Linear)
_SUPER = (SuperConv2d, SuperLinear)
User = tuple[int, str, int, tuple[int, int] | None]  # model, layer, number of templates, block


class BoundModels(nn.ModuleList):
    """Models that share a :class:`~spin_kernels.nn.SuperWeightBank`, and the bank, once in a state dict.

    A list of models in every other respect: the bank is a submodule, but no item. A part of the list, ``models[:2]``
    or ``models.select([0, 2])``, holds the same models and bank.
    """

    def __init__(self, models: list[nn.Module], bank: SuperWeightBank) -> None:
        super().__init__(models)
        self.bank = bank
        self.training = bank.training

    def _items(self) -> list[nn.Module]:
        return [module for name, module in self._modules.items() if name != "bank"]

    def __len__(self) -> int:
        return len(self._modules) - ("bank" in self._modules)  # none yet while nn.ModuleList is made

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._items())

    def __getitem__(self, index: int | slice) -> nn.Module | BoundModels:  # type: ignore[override]
        return BoundModels(self._items()[index], self.bank) if isinstance(index, slice) else self._items()[index]

    def __delitem__(self, index: int | slice) -> None:
        items = self._items()
        del items[index]
        self._modules = {str(n): item for n, item in enumerate(items)} | {"bank": self.bank}

    def insert(self, index: int, module: nn.Module) -> None:
        items = self._items()
        items.insert(index, module)
        self._modules = {str(n): item for n, item in enumerate(items)} | {"bank": self.bank}

    def select(self, indices: list[int]) -> BoundModels:
        """The models of these indices, in this order."""
        return BoundModels([self[index] for index in indices], self.bank)


def apply(models: Models, plan: Plan) -> nn.Module:
    """Copies models and makes their layers from one bank.

    Args:
        models: those that the plan was made from, or what an earlier ``apply`` returned, to go on with: then banks
            that the new plan leaves as they are keep their templates and coefficients, and all biases, norms and other
            layers keep their values. All else starts anew.
        plan: which layers share what.

    Returns:
        A copy of the model, with its bank as the submodule ``bank`` (in an ``nn.Sequential`` the last one); of several
        models :class:`BoundModels`, an ``nn.ModuleList`` with one. Each composes its weights in one launch per forward
        pass. ``bank.plan`` is the plan.

    Raises:
        ValueError: the plan is one of other models, or their layers differ in dtype or device.
    """
    networks = as_models(models)
    before = find_bank(models)
    if len(networks) != len(plan.models):
        raise ValueError(f"models: expected the {len(plan.models)} of the plan, got {len(networks)}; plan these models")
    if before is not None:
        bound_layers(models)
    copies = copy.deepcopy(networks, memo={} if before is None else {id(before): before})
    if before is not None:
        copies = [_released(network, before) for network in copies]
    for model, (network, planned) in enumerate(zip(copies, plan.models, strict=True)):
        found = dict(network.named_modules())
        if before is None and hasattr(network, "bank"):
            raise ValueError(f"models: expected no module or attribute 'bank' in model {model}, got one; rename it")
        for layer in planned:
            module: Any = found.get(layer.name)
            shape = tuple(module.weight.shape) if type(module) in _PLAIN else type(module).__name__
            if shape != layer.shape:
                raise ValueError(
                    f"plan: expected a layer {layer.name!r} with a weight of {layer.shape} in model {model}, got "
                    f"{'none' if module is None else shape}; plan these models, or apply the plan to those it is of"
                )
    layers: list[list[Any]] = [[network.get_submodule(layer.name) for layer in planned]
              for network, planned in zip(copies, plan.models, strict=True)]  # fmt: skip
    kinds = {(layer.weight.dtype, layer.weight.device) for found in layers for layer in found}
    if len(kinds) > 1:
        raise ValueError(f"models: expected layers of one dtype on one device, got {kinds}; move them before")
    ((dtype, device),) = kinds
    bank = SuperWeightBank(plan.bank_sizes, device=device, dtype=dtype)
    for model, network in enumerate(copies):
        for number, old in enumerate(layers[model]):
            new = from_bank(old, bank, plan.slabs(model, number), plan.base(model, number))
            replace(network, plan.models[model][number].name, new)
        bank.attach(network)
    trained = count_parameters(nn.ModuleList([*copies, bank]))
    if plan.strict and plan.count == "network" and trained > plan.budget:
        raise ValueError(
            f"plan: expected at most {plan.budget:,} parameters, got {trained:,} in these models; plan these models"
        )
    bank.plan = plan
    bank.train(all(network.training for network in copies))
    if before is not None:
        _carry(before, bank, networks, copies)
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        copies[0].bank = bank
        return copies[0]
    return BoundModels(copies, bank)


def plain(net: nn.Module) -> nn.Module:
    """Copies what :func:`apply` returned, with ``nn.Conv2d`` and ``nn.Linear`` whose weights are as composed now.

    For other tools and engines, and to look at gradients: sharing is gone.

    Raises:
        ValueError: ``net`` is not what ``apply`` returned.
    """
    bank = bound_bank(net)
    copies = [_released(network, bank) for network in copy.deepcopy(as_models(net), memo={id(bank): bank})]
    return nn.ModuleList(copies) if isinstance(net, nn.ModuleList) else copies[0]


def find_bank(net: object) -> SuperWeightBank | None:
    """The bank that :func:`apply` gave; None for other models."""
    bank = getattr(net, "bank", None)
    planned = isinstance(bank, SuperWeightBank) and isinstance(getattr(bank, "plan", None), Plan)
    return bank if planned else None


def bound_bank(net: object) -> SuperWeightBank:
    """The bank that :func:`apply` gave.

    Raises:
        ValueError: there is none.
    """
    bank = find_bank(net)
    if bank is None:
        raise ValueError(f"net: expected what spin.search.apply returned, got {type(net).__name__}; apply a plan first")
    return bank


def bound_layers(net: Models) -> list[list[Any]]:
    """For each model the layers that the bank makes, in the order of the plan.

    Raises:
        ValueError: these are not the models that ``apply`` returned, all of them in their order.
    """
    bank = bound_bank(net)
    networks = as_models(net)
    names = [[layer.name for layer in layers] for layers in bank.plan.models]
    of_networks = [dict(network.named_modules()) for network in networks]
    layers: list[list[Any]] = [
        [of.get(name) for name in listed] for of, listed in zip(of_networks, names, strict=False)
    ]
    numbers = [layer.bank_layers if isinstance(layer, _SUPER) and layer.bank is bank else None
               for found in layers for layer in found]  # fmt: skip
    if len(networks) != len(names) or numbers != [(n,) for n in range(len(bank.layers))]:
        raise ValueError(
            f"net: expected the {len(names)} models that spin.search.apply returned, in their order and with all of "
            f"their layers, got {len(networks)}; give what it returned, or apply a plan anew"
        )
    return layers


@torch.no_grad()
def _released(network: nn.Module, bank: SuperWeightBank) -> nn.Module:
    """The network itself, with plain layers and without the bank."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, _SUPER) and layer.bank is bank:
            options: dict[str, Any] = {"device": "meta", "dtype": bank.templates.dtype}
            new: Any
            if isinstance(layer, SuperLinear):
                new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, **options)
            else:
                geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
                new = nn.Conv2d(layer.in_channels, layer.out_channels, *geometry, layer.bias is not None, **options)
            new.weight, new.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
            replace(network, name, new.train(layer.training))
    bank.detach(network)
    if getattr(network, "bank", None) is bank:
        del network.bank
    return network


@torch.no_grad()
def _carry(before: SuperWeightBank, bank: SuperWeightBank, old: list[nn.Module], new: list[nn.Module]) -> None:
    """Copies the templates and coefficients of banks with the same layers and sizes, and the tiles' modulation."""
    old_users, new_users = (_users(plan) for plan in (before.plan, bank.plan))
    values: Any = bank.coefficients.values
    old_values: Any = before.coefficients.values
    same = {}
    for cluster, users in new_users.items():
        twin = next((c for c, of in old_users.items() if set(of) == set(users)), None)
        if twin is not None and before.sizes[twin] == bank.sizes[cluster]:
            same[cluster] = twin
            bank.templates[bank.place(cluster)] = before.templates[before.place(twin)]
            for at, vector in users.items():
                key, old_key = (cluster, vector), (twin, old_users[twin][at])
                length = bank.coefficients.lengths[key]
                if before.coefficients.lengths[old_key] == length:
                    start, old_start = bank.coefficients.start(key), before.coefficients.start(old_key)
                    values[start : start + length] = old_values[old_start : old_start + length]
    for model, planned in enumerate(bank.plan.models):
        for layer in planned:
            module: Any
            module, source = (networks[model].get_submodule(layer.name) for networks in (new, old))
            if bank.plan.bank_name(layer.cluster, 0) in same and module.alpha is not None:
                for name in ("alpha", "beta"):
                    getattr(module, name).copy_(getattr(source, name))


def _users(plan: Plan) -> dict[str, dict[User, str]]:
    """For each cluster of the bank who combines its templates by which vector."""
    found: dict[str, dict[User, str]] = {}
    for model, planned in enumerate(plan.models):
        for number, layer in enumerate(planned):
            for slab in plan.slabs(model, number):
                assert slab.coefficients is not None
                user = model, layer.name, slab.templates, plan.blocks.get(layer.cluster)
                found.setdefault(slab.cluster, {})[user] = slab.coefficients
    return found
