"""fastbert.patch: transformers' models of every type and head give what they gave, and stay what they were."""

import contextlib
import copy
import functools
import io
import pickle
import subprocess
import sys

import pytest
import torch
from patched_models import CONFIGS, MASK, S, batch, make, real, transformers, word_labels
from torch import nn

import fastbert
from fastbert.models.bert import BertModel
from fastbert.models.roberta import RobertaModel

HEADS = [
    "AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
]  # fmt: skip


def tensors(output):
    """Of a model's output, by name, hidden states one by one."""
    for name, value in output.items():
        if isinstance(value, tuple):
            yield from ((f"{name}[{i}]", x) for i, x in enumerate(value))
        elif value is not None:
            yield name, value


def assert_same(ours, theirs, atol):
    ours, theirs = dict(tensors(ours)), dict(tensors(theirs))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].shape == x.shape and ours[name].dtype == x.dtype, name
        torch.testing.assert_close(
            real(ours[name]), real(x), atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_head_gives_what_it_gave(kind):
    """In float64 to rounding, which shows the wiring exact; in float32, by the kernels, within 1e-4."""
    for head in HEADS:
        model = make(kind, head)
        inputs = batch(model) | {"output_hidden_states": True}
        for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            model.to(dtype)
            before = {name: x.clone() for name, x in model.state_dict().items()}
            with torch.no_grad():
                theirs = model(**inputs)
                with fastbert.patched(model) as same:
                    assert same is model
                    ours = model(**inputs)
            assert_same(ours, theirs, atol)
            after = model.state_dict()
            assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_transformers(kind):
    """Of a classifier and of masked words, without dropout; a parameter without one has none."""
    for head in ("AutoModelForSequenceClassification", "AutoModelForMaskedLM"):
        model = make(kind, head, dropout=False).train()
        inputs = batch(model)
        labels = word_labels(inputs) if "Masked" in head else torch.tensor([0, 1, 1, 0])
        for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            model.to(dtype)
            found = []
            for block in (contextlib.nullcontext(), fastbert.patched(model)):
                with block:
                    model.zero_grad()
                    loss = model(**inputs, labels=labels).loss
                    loss.backward()
                found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
            (theirs, their_gradients), (ours, gradients) = found
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
            for name, gradient in their_gradients.items():
                if gradient is None:
                    assert gradients[name] is None, name
                else:
                    torch.testing.assert_close(gradients[name], gradient, atol=atol, rtol=0, msg=name)


def test_every_backend_computes_it(best):
    model = make("bert", "AutoModelForSequenceClassification", dropout=False, num_hidden_layers=1).train()
    inputs = batch(model) | {"labels": torch.tensor([0, 1, 1, 0])}
    theirs = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    ours = torch.autograd.grad(fastbert.patch(model)(**inputs).loss, list(model.parameters()))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "own"), [("bert", BertModel), ("roberta", RobertaModel)])
def test_dropout_is_that_of_our_own_model(kind, own, tmp_path):
    """Our models draw in the same order, so the same seed drops the same elements in both."""
    theirs = make(kind)
    theirs.save_pretrained(tmp_path)
    ours = own.from_pretrained(tmp_path).train()
    fastbert.patch(theirs).train()
    inputs = batch(theirs)
    torch.manual_seed(5)
    expected = ours(**inputs)
    torch.manual_seed(5)
    found = theirs(**inputs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
    assert (found.last_hidden_state - theirs.eval()(**inputs).last_hidden_state).abs().max() > 0.1


def test_parts_in_evaluation_mode_drop_nothing():
    model = fastbert.patch(make("bert"))
    inputs = batch(model)
    expected = model(**inputs).last_hidden_state
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "attention_head_size"):
            module.eval()
    assert torch.equal(model(**inputs).last_hidden_state, expected)


FORMS = {
    "no mask": lambda model, inputs: {"input_ids": inputs["input_ids"]},
    "a mask of ones": lambda model, inputs: inputs | {"attention_mask": torch.ones_like(MASK)},
    "a mask of floats": lambda model, inputs: inputs | {"attention_mask": MASK.float()},
    "a mask of bools": lambda model, inputs: inputs | {"attention_mask": MASK.bool()},
    "holes": lambda model, inputs: inputs | {"attention_mask": MASK * (torch.arange(S) % 4 != 2)},
    "positions": lambda model, inputs: inputs | {"position_ids": torch.arange(S).flip(0)[None] + 2},
    "embedded": lambda model, inputs: {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "attention_mask": MASK,
    },
    "a tuple": lambda model, inputs: inputs | {"return_dict": False},
    "ids of 32 bits": lambda model, inputs: inputs | {"input_ids": inputs["input_ids"].int()},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.filterwarnings("error")
def test_every_form_of_a_batch_is_packed(kind, form):
    model = make(kind)
    inputs = FORMS[form](model, batch(model))
    mask = inputs.get("attention_mask", torch.ones(1, 1)).bool().expand(MASK.shape)
    with torch.no_grad():
        theirs, ours = model(**inputs)[0], fastbert.patch(model)(**inputs)[0]
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
    assert not ours[~mask].any()


def test_task_types_of_ernie():
    model = make("ernie")
    inputs = batch(model) | {"task_type_ids": torch.full_like(MASK, 2)}
    with torch.no_grad():
        theirs, ours = model(**inputs)[0], fastbert.patch(model)(**inputs)[0]
    torch.testing.assert_close(real(ours), real(theirs), atol=1e-5, rtol=0)
    assert (real(ours) - real(model(**batch(model))[0])).abs().max() > 0.1


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"])
def test_forms_of_gelu(activation):
    model = make("bert", hidden_act=activation)
    inputs = batch(model)
    with torch.no_grad():
        theirs, ours = model(**inputs)[0], fastbert.patch(model)(**inputs)[0]
    torch.testing.assert_close(real(ours), real(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_drop_the_same(reentrant):
    model = fastbert.patch(make("bert", "AutoModelForSequenceClassification")).train()
    inputs, found = batch(model) | {"labels": torch.tensor([0, 1, 1, 0])}, []
    for again in (False, True):
        if again:
            # its newer name is not in transformers 5.0
            for layer in model.bert.encoder.layer:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = lambda f, *x: torch.utils.checkpoint.checkpoint(
                    f, *x, use_reentrant=reentrant
                )
        torch.manual_seed(1)
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for ours, expected in zip(*reversed(found), strict=True):
        assert torch.equal(ours, expected)


# ---- what it stays -------------------------------------------------------------------------------------------------


def test_it_is_the_same_model_to_everybody_else(tmp_path):
    model = make("bert", "AutoModelForMaskedLM")
    plain, inputs = copy.deepcopy(model), batch(model)
    assert fastbert.patch(model) is model and fastbert.patch(model) is model
    assert isinstance(model, transformers.BertForMaskedLM) and isinstance(model.bert, transformers.BertModel)
    assert str(type(model)) == str(type(plain)) and str(model) == str(plain)
    expected = model(**inputs).logits
    for path in ("ours", "theirs"):
        (model if path == "ours" else plain).save_pretrained(tmp_path / path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for each in copies:
        assert type(each) is type(model) and type(each.bert) is type(model.bert)
        assert torch.equal(each(**inputs).logits, expected)
        fastbert.unpatch(each)
    assert fastbert.unpatch(model) is model
    for each in (model, *copies):
        assert type(each) is transformers.BertForMaskedLM and type(each.bert) is transformers.BertModel
    torch.testing.assert_close(real(model(**inputs).logits), real(plain(**inputs).logits), atol=0, rtol=0)


def test_a_new_model_of_its_class_is_not_patched(tmp_path):
    model = fastbert.patch(make("bert", "AutoModelForMaskedLM"))
    model.save_pretrained(tmp_path)
    for made in (type(model)(model.config), type(model).from_pretrained(tmp_path)):
        assert type(made) is transformers.BertForMaskedLM and type(made.bert) is transformers.BertModel


def test_replicas_stay_patched_and_a_wrapped_forward_is_unpatched():
    """nn.DataParallel makes the first, accelerate the second."""
    model = make("bert")
    inputs = batch(model)
    expected = model(**inputs).last_hidden_state
    replica = fastbert.patch(model)._replicate_for_data_parallel()
    assert type(replica) is type(model) and not replica(**inputs).last_hidden_state[MASK == 0].any()
    model.forward = functools.partial(model.forward)
    fastbert.patch(model)  # it is already
    assert torch.equal(fastbert.unpatch(model)(**inputs).last_hidden_state, expected)


def test_arguments_that_it_has_not_are_refused_as_before():
    model = fastbert.patch(make("bert"))
    ids = batch(model)["input_ids"]
    for given in ((ids,) * 9, (ids,)):
        with pytest.raises(TypeError, match=r"positional arguments|multiple values for argument 'input_ids'"):
            model(*given, input_ids=ids)


def test_a_block_leaves_what_was_patched_before():
    inner = make("bert")
    both = nn.ModuleList([inner, make("roberta")])
    fastbert.patch(inner)
    with pytest.raises(RuntimeError, match="left"), fastbert.patched(both):
        assert type(both[1]) is not transformers.RobertaModel
        raise RuntimeError("left")
    assert type(inner) is not transformers.BertModel and type(both[1]) is transformers.RobertaModel
    fastbert.unpatch(both)
    assert type(inner) is transformers.BertModel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_and_autocast_keep_their_dtypes(dtype):
    """As far from float32 as transformers' own model of such weights is, at most twice."""
    model = make("bert", "AutoModelForSequenceClassification")
    inputs = batch(model) | {"output_hidden_states": True}
    with torch.no_grad():
        truth = model(**inputs)
        theirs = copy.deepcopy(model).to(dtype)(**inputs)
        ours = fastbert.patch(copy.deepcopy(model)).to(dtype)(**inputs)
        with torch.autocast("cpu", dtype):
            theirs_cast, ours_cast = model(**inputs), fastbert.patch(model)(**inputs)
    off = (theirs.hidden_states[-1].float() - truth.hidden_states[-1])[MASK.bool()].abs().max()
    for found, like in ((ours, theirs), (ours_cast, theirs_cast)):
        assert [x.dtype for x in found.hidden_states] == [x.dtype for x in like.hidden_states]
        assert found.logits.dtype == like.logits.dtype
        assert (found.hidden_states[-1].float() - truth.hidden_states[-1])[MASK.bool()].abs().max() <= 2 * off


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute")  # the compiler's own
def test_compiled_it_gives_the_same():
    model = fastbert.patch(make("bert", "AutoModelForSequenceClassification", dropout=False, num_hidden_layers=1))
    inputs = batch(model.train()) | {"labels": torch.tensor([0, 1, 1, 0])}
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="eager")  # ops under other compilers: tests/ops/test_compile.py
    compiled(**inputs).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=0)
    fewer = {name: x[:2] for name, x in inputs.items()}
    torch.testing.assert_close(compiled(**fewer).logits, model(**fewer).logits)


def test_distributed_it_gives_the_same_gradients(tmp_path):
    model = fastbert.patch(make("bert", "AutoModelForSequenceClassification", dropout=False)).train()
    inputs = batch(model) | {"labels": torch.tensor([0, 1, 1, 0])}
    model(**inputs).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(model)(**inputs).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_importing_fastbert_does_not_import_transformers():
    code = "import sys, fastbert; assert fastbert.patch and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fastbert.extras.find_spec", lambda name: None)
    for call in (fastbert.patch, fastbert.unpatch, lambda model: fastbert.register_attention()):
        with pytest.raises(ImportError, match=r"needs transformers: pip install '.\[patch\]'"):
            call(nn.Linear(1, 1))
