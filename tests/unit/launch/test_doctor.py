"""What `tandem doctor` says of the installation."""

import importlib.metadata
import importlib.util

from packaging.requirements import Requirement

from tandem.launch import doctor


def test_every_package_that_is_needed_is_looked_for_by_the_name_it_is_imported_by():
    """annotated-types is imported as annotated_types: it was called broken."""
    lines = importlib.metadata.requires("tandem-rl")
    needed = [Requirement(line) for line in lines]
    names = [requirement.name for requirement in needed if requirement.marker is None]
    assert {"pyyaml", "annotated-types"} <= set(names)
    for name in names:
        assert importlib.util.find_spec(doctor.module_of(name)), name
