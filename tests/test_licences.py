"""Everything that specchat needs has a permissive licence, or is a library of NVIDIA that torch brings."""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

# MPL asks for changes to the package's own files only. NVIDIA's libraries come with torch's wheels.
_FINE = re.compile(
    r"apache|\bmit\b|\bbsd\b|0bsd|3-clause|2-clause|isc|psf|python software|mpl|mozilla|zlib|unlicense|hpnd|cc0|nvidia",
    re.I,
)


def needed(name: str, extras: frozenset[str], seen: set[str]) -> Iterator[Distribution]:
    """Yield what a package needs, with what that needs in turn."""
    try:
        found = distribution(name)
    except PackageNotFoundError:  # for another system
        return
    if found.name.lower() in seen:
        return
    seen.add(found.name.lower())
    yield found
    for text in found.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            yield from needed(requirement.name, frozenset(requirement.extras), seen)


def licence(package: Distribution) -> str:
    """What a package says of its licence, in whichever field."""
    if package.name == "cuda-toolkit":  # names NVIDIA's libraries, and says nothing of itself
        return "nvidia"
    values = package.metadata
    classifiers = [each for each in values.get_all("Classifier") or () if each.startswith("License")]
    return " ".join([values.get("License-Expression") or "", (values.get("License") or "")[:200], *classifiers])


def test_licences_are_permissive():
    packages = list(needed("specchat", frozenset({"plot", "serve"}), set()))
    assert len(packages) > 20
    odd = {each.name: licence(each) for each in packages if each.name != "specchat" and not _FINE.search(licence(each))}
    assert not odd
