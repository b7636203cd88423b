"""families.py: what the pictures and the page have in common."""

from __future__ import annotations

from minipeft.methods import METHODS
from minipeft.report.families import FAMILIES, family_of, main_of


def test_every_method_is_in_one_family_and_families_differ_by_color_and_by_marker():
    assert sorted(method for family in FAMILIES for method in family.methods) == sorted(METHODS)
    assert all(method in family_of(method).methods for method in METHODS)
    assert len({family.color for family in FAMILIES}) == len({family.marker for family in FAMILIES}) == len(FAMILIES)


def test_the_main_dataset_is_the_one_with_the_most_methods_and_of_several_imdb():
    def datasets(**methods):
        return {name: {"methods": dict.fromkeys(found.split())} for name, found in methods.items()}

    assert main_of(datasets(films="lora", imdb="lora", sst2="full")) == "imdb"
    assert main_of(datasets(imdb="lora", sst2="lora full")) == "sst2"
    assert main_of(datasets(films="lora full", sst2="lora full")) == "films"
