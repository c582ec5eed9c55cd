"""What a package says of itself: products with the kernel that Inductor chose and the layer they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from recon.engines.aoti.package import Identity, read
from recon.formats import EngineLayer, Inspection

COPIES = ("cpp_fused", "triton_poi", "triton_red", "triton_per")  # what makes operands, beside the product itself


def inspect(path: Path) -> Inspection:
    """Products of a package with their operands' formats: after lowering, or as they ran when the package was made.

    What a weight of recon's kernels is stored in is read from the file again.

    Raises:
        ReconError: the file is missing, damaged, or no package that recon built.
    """
    identity, kernels = read(path)
    if identity.form:
        return Inspection(tuple(_form_layers(path, identity)))
    layers = [
        EngineLayer(
            name=product["node"],
            op=product["op"],
            compute=product["compute"],
            weight=product["weight"],
            modules=(product["module"],) if product["module"] else (),
            kernel=kernel_of(product["node"], kernels),
            inputs=tuple(product["inputs"]),
            outputs=(product["output"],),
        )
        for product in identity.products
    ]
    return Inspection(tuple(layers))


def _form_layers(path: Path, identity: Identity) -> Iterator[EngineLayer]:
    from recon.engines.aoti.form import stored

    formats = stored(path)
    for product in identity.products:
        yield EngineLayer(
            name=product["node"],
            op=product["op"],
            compute=product["compute"],
            weight=formats.get(product["tensor"], "missing") if product["tensor"] else "",
            modules=tuple(product["modules"]),
            kernel=product["op"],
            inputs=tuple(product["inputs"]),
            outputs=(product["output"],),
        )


def kernel_of(node: str, kernels: Mapping[str, list[str]]) -> str:
    """The kernel that computes a node: a library call or a matrix template before a fused elementwise one."""
    found = [name for name, nodes in kernels.items() if node in nodes]
    found.sort(key=lambda name: (name.startswith(COPIES), len(kernels[name])))
    return found[0].partition(":")[0] if found else ""
