"""Model testers for transformers' ModelTesterMixin: RoBERTa and DeBERTa-V2, a test class per configuration.

Environment variable FOREIGN_SIDE=ours|theirs chooses the classes; everything else is the same. transformers' classes
ignore the LoRA settings in their config.
"""

import os
import unittest

import torch
import transformers
from tests.test_configuration_common import ConfigTester  # transformers', from its source distribution
from tests.test_modeling_common import ModelTesterMixin
from transformers import DebertaV2Config, RobertaConfig

import lora_nlu.models.modeling_deberta_v2
import lora_nlu.models.modeling_roberta
from lora_nlu.methods.targets import TARGETS
from lora_nlu.models.modeling_roberta import EncoderLayer

THEIRS = os.environ["FOREIGN_SIDE"] == "theirs"
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
if not THEIRS:  # Tests look here for what a model can return; our models don't use transformers' recorder for it.
    lora_nlu.models.modeling_roberta.RobertaPreTrainedModel._can_record_outputs = {"hidden_states": EncoderLayer}


class ModelTester:
    """What ModelTesterMixin needs of a model tester: sizes, a config and a batch of 5 sequences of up to 7 tokens."""

    is_training = True
    batch_size, seq_length = 5, 7

    def __init__(self, config_class, holes, settings):
        self.config_class, self.holes, self.settings = config_class, holes, {**SIZES, **settings}
        vars(self).update(self.settings)

    def get_config(self):
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        if self.holes:
            mask = torch.rand(shape) < 0.7
            mask[:, 0] = True
        else:
            mask = torch.arange(self.seq_length) < torch.tensor([7, 3, 5, 1, 6])[:, None]
        # no padding tokens: RoBERTa counts positions by them, which it can't for inputs_embeds
        ids = torch.randint(3, self.vocab_size, shape)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask.long()}


class ModelTests(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # the mixin skips this test for older models by default
    config_class = None
    holes = False
    settings = {}

    def setUp(self):
        self.model_tester = ModelTester(self.config_class, self.holes, self.settings)

    def test_config(self):
        ConfigTester(self, config_class=self.config_class, hidden_size=36).run_common_tests()


class RobertaTests(ModelTests):
    config_class = RobertaConfig
    module = transformers if THEIRS else lora_nlu.models.modeling_roberta
    all_model_classes = (module.RobertaModel, module.RobertaForSequenceClassification)


class DebertaV2Tests(ModelTests):
    config_class = DebertaV2Config
    module = transformers if THEIRS else lora_nlu.models.modeling_deberta_v2
    all_model_classes = (module.DebertaV2Model, module.DebertaV2ForSequenceClassification)


LORA = {"apply_lora": True, "lora_r": 3, "lora_alpha": 6}
V2_XXLARGE = {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
V3_BASE = {key: value for key, value in V2_XXLARGE.items() if not key.startswith("conv")}


class TestRoberta(RobertaTests, unittest.TestCase):
    pass


class TestRobertaHoles(RobertaTests, unittest.TestCase):
    holes = True
    settings = {"type_vocab_size": 3, "classifier_dropout": 0.2, "hidden_act": "relu"}


class TestRobertaLora(RobertaTests, unittest.TestCase):
    settings = LORA


class TestRobertaLoraEverywhere(RobertaTests, unittest.TestCase):
    """Several tests use only the first class: here the classifier."""

    all_model_classes = RobertaTests.all_model_classes[::-1]
    settings = LORA | {"lora_target_modules": list(TARGETS), "lora_dropout": 0.1}


class TestRobertaHoulsby(RobertaTests, unittest.TestCase):
    settings = {"apply_adapter": True, "adapter_type": "houlsby", "adapter_size": 4}


class TestDebertaV2XXLarge(DebertaV2Tests, unittest.TestCase):
    settings = V2_XXLARGE


class TestDebertaV2Absolute(DebertaV2Tests, unittest.TestCase):
    holes = True
    settings = {"type_vocab_size": 2, "relative_attention": False, "position_biased_input": True}


class TestDebertaV2OwnKeys(DebertaV2Tests, unittest.TestCase):
    """Relative attention without buckets, with its own projections; embeddings smaller than the hidden size."""

    settings = {"relative_attention": True, "pos_att_type": "p2c|c2p", "embedding_size": 16}


class TestDebertaV3Lora(DebertaV2Tests, unittest.TestCase):
    settings = V3_BASE | LORA


class TestDebertaV3LoraEverywhere(DebertaV2Tests, unittest.TestCase):
    all_model_classes = DebertaV2Tests.all_model_classes[::-1]
    holes = True
    settings = V3_BASE | LORA | {"lora_target_modules": list(TARGETS), "lora_relative_query": True}
