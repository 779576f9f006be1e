"""The isotropic networks of :mod:`.registry` in timm's: ``timm.create_model("spin_<name>")``.

The others lack the ``drop_rate`` or ``forward_features`` that timm's users expect of every network.

timm is never imported from here: that takes as long as importing torch, and fails where torchvision does not load.
Where it has been imported, it gets the names at once, else right after whoever needs it has imported it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import registry

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "num_classes": 1000}
_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616), "num_classes": 10, "crop_pct": 1.0}
_ARGUMENTS = {"in_chans": "in_channels", "img_size": "image_size"}

default_cfgs: dict[str, dict[str, Any]] = {}  # timm's register_model looks here


def register_in_timm() -> None:
    """Registers the isotropic networks in timm, now or as soon as it has been imported."""
    if hasattr(sys.modules.get("timm"), "create_model"):
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


def _register() -> None:
    from timm.models import register_model

    for name in registry.isotropic_models():
        side = registry.image_size(name)
        data = _CIFAR if side == 32 else _IMAGENET
        default_cfgs[f"spin_{name}"] = {"input_size": (3, side, side), "fixed_input_size": "vit" in name, **data}
        register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., registry.Model]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,  # for weights to download
        **options: Any,
    ) -> registry.Model:
        if pretrained:
            raise ValueError(f"pretrained: expected False, got True; no weights of spin_{name} have been published")
        from timm.models import resolve_pretrained_cfg

        config = resolve_pretrained_cfg(f"spin_{name}", pretrained_cfg, pretrained_cfg_overlay).to_dict()
        options = {_ARGUMENTS.get(key, key): value for key, value in options.items()}
        model = registry.create(name, **options)
        model.in_chans = channels = options.get("in_channels", 3)
        model.num_classes = options.get("num_classes", default_cfgs[f"spin_{name}"]["num_classes"])
        # The model knows better than a configuration what it takes.
        config["input_size"] = (channels, *getattr(model, "image_size", config["input_size"][1:]))
        for key in ("mean", "std"):
            if len(config[key]) != channels:
                config[key] = (0.5,) * channels
        model.pretrained_cfg = model.default_cfg = config
        return model

    build.__name__ = build.__qualname__ = f"spin_{name}"
    return build


class _AfterTimm:
    """A finder that finds timm as the others do, with a loader that registers the networks when it has loaded it."""

    searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "timm" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec, self)
        return spec


class _Loader(Loader):
    def __init__(self, spec: ModuleSpec, finder: _AfterTimm) -> None:
        self.spec, self.finder = spec, finder
        self.loader: Any = spec.loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.spec.loader = self.loader  # timm keeps what it would have without us
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            _register()
