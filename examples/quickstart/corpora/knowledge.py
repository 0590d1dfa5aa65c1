"""A generated encyclopedia of people, places and works that never were.

The world is drawn once from the seed; every document then tells some of its facts in one of several wordings. Because
nothing here is true anywhere else, whatever a model knows about it was learned from this corpus, and because each
fact is told many times, unseen documents about the same world are predictable.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.quickstart.corpora import wordings

PEOPLE, PLACES, WORKS = 150, 110, 100


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_STARTS = _words("Al Bar Cor Dal El Fen Gal Hol Is Jor Kal Lin Mar Nor Or Pel Quin Ros Sel Tor Ul Var Wen Yar Zel")
_MIDDLES = _words("a e i o u an en in or ar el il")
_GIVEN_ENDS = (_words("ra lia na dis wen"), _words("rik den mon tas vin"))
_FAMILY_ENDS = _words("berg well more hurst strom field mark son thorp wick lund quist")
_PLACE_ENDS = {
    "town": _words("ton bury ford haven stead"),
    "river": _words("run beck water"),
    "island": _words("ey holm skerry"),
    "mountain": _words("horn peak fell"),
    "lake": _words("mere tarn loch"),
}
_REGION_ENDS = _words("land mar ia shire")
_PROFESSIONS = _words("painter poet composer architect botanist astronomer physician engineer historian sculptor")
_PRODUCTS = _words("glass salt wool clocks honey paper silk cheese copper violins roses ships")
_WORK_KINDS = {
    "painter": "painting",
    "poet": "poem",
    "composer": "opera",
    "architect": "bridge",
    "botanist": "herbal",
    "astronomer": "star atlas",
    "physician": "treatise",
    "engineer": "clock tower",
    "historian": "chronicle",
    "sculptor": "statue",
}
_ADJECTIVES = _words("Silent Golden Broken Distant Hidden Burning Seventh Winter Crimson Patient Hollow Bright")
_NOUNS = _words("Garden Harbour Lantern Mirror Orchard Tower Voyage River Crown Window Forest Bell Island Letter")


@dataclass(frozen=True)
class Fact:
    """One statement about the world: ``relation(subject) = value``."""

    subject: str
    relation: str
    """A key of :data:`wordings.STATEMENTS` and :data:`wordings.QUESTIONS`."""
    value: str


@dataclass(frozen=True)
class Entity:
    """A person, a place or a work, with all that is known about it."""

    name: str
    kind: str
    """``person``, ``work``, or the kind of place."""
    facts: tuple[Fact, ...]
    related: tuple[str, ...]
    """Names of entities that a document about this one may turn to."""

    def value(self, relation: str) -> str | None:
        """What is known under a relation."""
        return next((fact.value for fact in self.facts if fact.relation == relation), None)

    def stand_in(self) -> str:
        """What may stand for the name once it has been said: "the painter", "the river", "the opera"."""
        kinds = (self.value(relation) for relation in wordings.KIND_RELATIONS)
        return f"the {next(kind for kind in kinds if kind)}"


@dataclass(frozen=True)
class World:
    """Everything there is."""

    entities: tuple[Entity, ...]
    by_name: Mapping[str, Entity]
    """The same entities by their names, which are unique."""


def make_world(seed: int) -> World:
    """Draw the world: the same for the same seed, whatever is written about it later."""
    rng = random.Random(f"world {seed}")
    names: set[str] = set()
    places = _places(rng, names)
    towns = [place for place in places if place.kind == "town"]
    people = _people(rng, names, towns)
    works = _works(rng, names, people, towns)
    entities = (*people, *places, *works)
    return World(entities, {entity.name: entity for entity in entities})


def generate(seed: int, part: int, characters: int) -> list[str]:
    """Documents of about the given total length; the part number makes pieces that differ, for parallel work."""
    world = make_world(seed)
    rng = random.Random(f"knowledge {seed} {part}")
    texts, length = [], 0
    while length < characters:
        entity = rng.choice(world.entities)
        form = rng.choices((_article, _questions, _comparison), weights=(5, 3, 2))[0]
        text = form(rng, entity, world)
        if text is not None:
            texts.append(text)
            length += len(text)
    return texts


def _article(rng: random.Random, entity: Entity, world: World) -> str:
    """A title and a few sentences, some of them about a related entity."""
    facts = rng.sample(entity.facts, rng.randint(min(3, len(entity.facts)), len(entity.facts)))
    sentences = [_statement(rng, fact, entity.stand_in() if number else None) for number, fact in enumerate(facts)]
    if entity.related and rng.random() < 0.7:
        other = world.by_name[rng.choice(entity.related)]
        facts = rng.sample(other.facts, min(2, len(other.facts)))
        sentences += [_statement(rng, fact) for fact in facts]
    return f"{entity.name}\n\n" + " ".join(sentences)


def _questions(rng: random.Random, entity: Entity, world: World) -> str:
    """Questions with short answers about one entity and those around it."""
    facts = list(entity.facts)
    for name in rng.sample(entity.related, min(2, len(entity.related))):
        facts += world.by_name[name].facts
    chosen = rng.sample(facts, min(len(facts), rng.randint(3, 6)))
    pairs = [
        f"Question: {rng.choice(wordings.QUESTIONS[fact.relation]).format(s=fact.subject)}\nAnswer: {fact.value}"
        for fact in chosen
    ]
    return "\n\n".join(pairs)


def _comparison(rng: random.Random, entity: Entity, world: World) -> str | None:
    """Two entities of one kind side by side; None when the relation drawn cannot be ordered."""
    relation = rng.choice([fact.relation for fact in entity.facts])
    if relation not in wordings.COMPARISONS:
        return None
    other = rng.choice(world.entities)
    first, second = entity.value(relation), other.value(relation)
    if other is entity or first is None or second is None or first == second:
        return None
    low, high = other, entity
    if _number(first) < _number(second):
        low, high = entity, other
    facts = [fact for fact in (*entity.facts, *other.facts) if fact.relation == relation]
    sentences = [_statement(rng, fact) for fact in facts]
    sentences.append(rng.choice(wordings.COMPARISONS[relation]).format(low=low.name, high=high.name))
    return f"{entity.name} and {other.name}\n\n" + " ".join(sentences)


def _statement(rng: random.Random, fact: Fact, stand_in: str | None = None) -> str:
    """A fact in one of its wordings; in running text "the painter" may stand for the name."""
    subject = fact.subject
    if stand_in and fact.relation not in wordings.KIND_RELATIONS and rng.random() < 0.5:
        subject = stand_in
    article = "an" if fact.value[0] in "aeiou" else "a"
    sentence = rng.choice(wordings.STATEMENTS[fact.relation]).format(s=subject, v=fact.value, a=article)
    return sentence[0].upper() + sentence[1:]


def _places(rng: random.Random, names: set[str]) -> list[Entity]:
    regions = [_fresh(rng, names, _REGION_ENDS) for _ in range(8)]
    drawn = [("town", _fresh(rng, names, _PLACE_ENDS["town"])) for _ in range(PLACES // 2)]
    natural = [kind for kind in _PLACE_ENDS if kind != "town"]
    for number in range(PLACES - len(drawn)):
        kind = natural[number % len(natural)]
        drawn.append((kind, _fresh(rng, names, _PLACE_ENDS[kind])))
    towns = [name for kind, name in drawn if kind == "town"]
    entities = []
    for kind, name in drawn:
        facts = [("region", rng.choice(regions))]
        neighbour = rng.choice([town for town in towns if town != name])
        if kind == "town":
            facts += [("founded", str(rng.randint(1010, 1690))), ("product", rng.choice(_PRODUCTS))]
            facts += [("people", str(rng.randint(2, 95) * 1000)), ("neighbour", neighbour)]
        elif kind == "river":
            facts += [("length", f"{rng.randint(40, 890)} km"), ("mouth", neighbour)]
        elif kind == "mountain":
            facts += [("height", f"{rng.randint(700, 4900)} m"), ("above", neighbour)]
        else:
            facts += [("area", f"{rng.randint(11, 980)} square km"), ("near", neighbour)]
        entities.append(_entity(name, kind, "place", facts, (neighbour,)))
    return entities


def _people(rng: random.Random, names: set[str], towns: Sequence[Entity]) -> list[Entity]:
    entities: list[Entity] = []
    for _ in range(PEOPLE):
        name = f"{_fresh(rng, names, rng.choice(_GIVEN_ENDS))} {_fresh(rng, names, _FAMILY_ENDS)}"
        born, home, later = rng.randint(1702, 1898), rng.choice(towns).name, rng.choice(towns).name
        facts = [("profession", rng.choice(_PROFESSIONS)), ("born", str(born)), ("birthplace", home)]
        facts += [("died", str(born + rng.randint(41, 92))), ("lived", later)]
        related = [home, later]
        older = [one.name for one in entities if 18 <= born - int(one.value("person.born") or 0) <= 50]
        if older:
            teacher = rng.choice(older)
            facts.append(("teacher", teacher))
            related.append(teacher)
        entities.append(_entity(name, "person", "person", facts, related))
    return entities


def _works(rng: random.Random, names: set[str], people: Sequence[Entity], towns: Sequence[Entity]) -> list[Entity]:
    entities: list[Entity] = []
    while len(entities) < WORKS:
        title = f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
        if title in names:
            continue
        names.add(title)
        maker, town = rng.choice(people), rng.choice(towns).name
        year = int(maker.value("person.born") or 0) + rng.randint(20, 40)
        kind = _WORK_KINDS[maker.value("person.profession") or ""]
        facts = [("kind", kind), ("maker", maker.name), ("year", str(year)), ("town", town)]
        entities.append(_entity(title, "work", "work", facts, (maker.name, town)))
    return entities


def _entity(name: str, kind: str, family: str, facts: Sequence[tuple[str, str]], related: Sequence[str]) -> Entity:
    prefix = f"{family}."
    stated = [Fact(name, prefix + relation, value) for relation, value in facts]
    if family == "place":
        stated.insert(0, Fact(name, "place.kind", kind))
    return Entity(name, kind, tuple(stated), tuple(dict.fromkeys(related)))


def _fresh(rng: random.Random, names: set[str], endings: Sequence[str]) -> str:
    """A name that nothing bears yet."""
    while True:
        name = rng.choice(_STARTS) + (rng.choice(_MIDDLES) if rng.random() < 0.7 else "") + rng.choice(endings)
        if name not in names:
            names.add(name)
            return name


def _number(value: str) -> int:
    return int(value.split()[0])
