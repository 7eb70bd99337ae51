"""Stubs of modules that the foreign test files import and that are neither in their source distributions nor installed.

The comment of each says why a stub is enough. Nothing else of theirs is replaced.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

STUBS = {
    # tests of exporters, which need packages that are not pinned here
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    # both models are encoders and can't generate; one test asks that their testers do not inherit from this class
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    # settings that a config must keep; the config classes are transformers' own on both sides, so a few will do
    "tests.utils.test_configuration_utils": {
        "config_common_kwargs": {"return_dict": False, "output_hidden_states": True, "dtype": "float16"}
    },
    # PEFT's common tests only ask whether a model is one of this class; a text classifier never is
    "diffusers": {"StableDiffusionPipeline": type("StableDiffusionPipeline", (), {})},
}


def install_stubs() -> None:
    """Make the modules importable, with the packages around them."""
    for name, attributes in STUBS.items():
        for module_name in filter(None, (name.rpartition(".")[0], name)):
            module = sys.modules.setdefault(module_name, ModuleType(module_name))
            module.__spec__ = module.__spec__ or ModuleSpec(module_name, None)
        vars(sys.modules[name]).update(attributes)
