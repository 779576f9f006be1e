"""Networks with and without shared weights: ConvMixers, Vision Transformers, isotropic ConvNeXts and ordinary CNNs."""

from .convmixer import ConvMixer, convmixer
from .convnext import ConvNeXt, convnext
from .p4cnn import P4CNN, RepeatedOrientations, p4cnn
from .registry import Model, create, image_size, isotropic_models, list_models
from .resnet import ResNet, resnet50
from .timm_registry import register_in_timm
from .vgg import VGG, vgg11
from .vit import VisionTransformer, vit
from .wide_resnet import WideResNet, wide_resnet

__all__ = [
    "P4CNN",
    "VGG",
    "ConvMixer",
    "ConvNeXt",
    "Model",
    "RepeatedOrientations",
    "ResNet",
    "VisionTransformer",
    "WideResNet",
    "convmixer",
    "convnext",
    "create",
    "image_size",
    "isotropic_models",
    "list_models",
    "p4cnn",
    "resnet50",
    "vgg11",
    "vit",
    "wide_resnet",
]

register_in_timm()
