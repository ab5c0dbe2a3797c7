"""The table of others' models, made of files as pytest writes them."""

from benchmarks.__main__ import main
from benchmarks.lib import records

CASE = '<testcase name="test_{}[{}]">{}</testcase>'
PROPERTY = '<properties><property name="{}" value="{}"/></properties>'
SKIPPED = '<skipped message="{}"/>'


def test_a_model_that_was_tested_replaces_its_record(tmp_path):
    def write(model, by_layers, version):
        cases = {
            "axes": PROPERTY.format("leaves", 7),
            "float_step": PROPERTY.format(
                "versions", f"{{&quot;jax&quot;: &quot;{version}&quot;}}"
            ),
            "codes": PROPERTY.format("fraction", 0.98),
            "trainer": '<failure message="it diverged"/>',
            "layerwise": by_layers,
            "checkpoint": "",
        }
        text = "".join(CASE.format(name, model, x) for name, x in cases.items())
        text += CASE.format("codes", "GPT of absent", SKIPPED.format("not here: gpt"))
        text += CASE.format("codes", "T5 of broken", '<error message="no protobuf"/>')
        path = tmp_path / f"{model}.xml"
        path.write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
        main(["others", str(path), "--out", str(tmp_path)])

    write("ViT of b", "", "0.10")
    write("UNet of a", SKIPPED.format("its layers skip"), "0.12")
    write("ViT of b", "", "0.12")
    assert list(records.read(tmp_path / "others.jsonl")["model"]) == [
        "UNet of a",
        "ViT of b",
    ]
    table = (tmp_path / "others.md").read_text()
    rows = [[x.strip() for x in row.split("|")[1:-1]] for row in table.splitlines()]
    first = ["7", "98.0 %", "yes", "yes", "failed"]
    assert rows[2] == ["UNet of a", *first, "no (1)", "yes"]
    assert rows[3] == ["ViT of b", *first, "yes", "yes"]
    assert table.endswith("1. its layers skip\n\nWith jax 0.12.\n")
