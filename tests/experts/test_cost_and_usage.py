"""What experts cost beside counts by hand, and the record of who is used where."""

import pytest
import torch

from metaopt.errors import DataError
from metaopt.experts import ExpertsConfig, ExpertUsage, attach_experts, expert_costs, get_experts
from tests.experts.families import build, stir


@pytest.mark.parametrize("family", ["vit", "cifar_resnet"])
def test_costs(family: str) -> None:
    model, images = build(family)
    network = sum(tensor.numel() for tensor in model.parameters())
    experts = attach_experts(model, ExpertsConfig(sdd=False, dag=False))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs = expert_costs(model, images, pairs=1)
    scalars = flops = 0
    for site in experts.sites:
        hidden = 4 * (site.width // 4)
        scalars += hidden * (2 * site.width + 1) + 4 * site.width
        side = {"layer1": 32, "layer2": 16, "layer3": 8}.get(site.name)
        positions = 2 * (side * side if side else 17)
        # Two products, and that of the uniform weights with the biases: one row for each sample.
        flops += 2 * positions * hidden * 2 * site.width + 2 * 2 * 4 * site.width
    assert (costs.parameters, costs.backbone_parameters) == (scalars, network)
    assert costs.flops - costs.backbone_flops == flops
    assert costs.held_mib > costs.backbone_held_mib > 0
    assert costs.latency_ratio > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.requires_grad and tensor.grad is None for tensor in model.parameters())


def test_usage_by_domain() -> None:
    model, images = build("vit")
    stir(attach_experts(model, ExpertsConfig(top_k=2)))
    usage, weights = ExpertUsage(), []
    gate = get_experts(model).mixture(get_experts(model).sites[1]).dag
    handle = gate.register_forward_hook(lambda _m, _i, output: weights.append(output))
    for domain in ("fog", "snow", "fog"):
        with usage.recording(model, domain), torch.no_grad():
            model(images + len(weights) / 10)
    model(images)  # not recorded
    handle.remove()
    assert usage.domains == ("fog", "snow")
    fog = torch.cat([weights[0], weights[2]]).flatten(0, 1).double()
    torch.testing.assert_close(usage.weights("fog")["blocks/1/mlp"], fog.mean(0))
    assert float(usage.weights("snow")["blocks/0/mlp"].sum()) == pytest.approx(1)
    axes = usage.figure(get_experts(model)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["low 0", "low 1", "high 2", "high 3"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fog", "snow"]


def test_usage_of_uniform_experts_and_of_nothing() -> None:
    model, images = build("cifar_resnet")
    attach_experts(model, ExpertsConfig(dag=False))
    usage = ExpertUsage()
    with pytest.raises(DataError, match="no expert usage of domain 'fog'; allowed are none"):
        usage.weights("fog")
    with pytest.raises(DataError, match="no expert usage was recorded"):
        usage.figure(get_experts(model))
    with usage.recording(model, "fog"):
        model(images)
    assert usage.weights("fog")["layer1"].tolist() == [0.25] * 4
