"""How the facts of the knowledge corpus are said: several statements and questions for each relation.

``{s}`` is the subject (a name, or "the painter" in its place), ``{v}`` the value, ``{a}`` the article that fits it.
"""

from __future__ import annotations

KIND_RELATIONS = ("person.profession", "place.kind", "work.kind")
"""The relation of each family that says what the subject is; its value may later stand for the name."""

STATEMENTS: dict[str, tuple[str, ...]] = {
    "person.profession": (
        "{s} was {a} {v} by profession.",
        "{s} is remembered as {a} {v}.",
        "{s} earned a living as {a} {v}.",
        "By trade, {s} was {a} {v}.",
    ),
    "person.born": (
        "{s} was born in {v}.",
        "{s} came into the world in {v}.",
        "The year in which {s} was born is {v}.",
        "In {v}, {s} was born.",
    ),
    "person.birthplace": (
        "{s} was a native of {v}.",
        "The birthplace of {s} is {v}.",
        "{v} is the town where {s} was born.",
        "{s} first saw the light of day in {v}.",
    ),
    "person.died": (
        "{s} died in {v}.",
        "{s} lived until {v}.",
        "The life of {s} ended in {v}.",
        "Death came to {s} in {v}.",
    ),
    "person.lived": (
        "{s} spent most of the later years in {v}.",
        "{s} lived and worked in {v}.",
        "The workshop of {s} stood in {v}.",
        "In later life {s} settled in {v}.",
    ),
    "person.teacher": (
        "{s} was taught by {v}.",
        "{s} studied under {v}.",
        "The teacher of {s} was {v}.",
        "It was {v} who taught {s}.",
    ),
    "place.kind": (
        "{s} is {a} {v}.",
        "{s} is known to everyone as {a} {v}.",
        "On every map {s} is drawn as {a} {v}.",
    ),
    "place.region": (
        "{s} lies in {v}.",
        "{s} is found in the region of {v}.",
        "{s} belongs to {v}.",
        "The region around {s} is called {v}.",
    ),
    "place.founded": (
        "{s} was founded in {v}.",
        "{s} dates from {v}.",
        "The founding year of {s} is {v}.",
        "Settlers founded {s} in {v}.",
    ),
    "place.product": (
        "{s} is famous for its {v}.",
        "Most families in {s} make or sell {v}.",
        "{s} lives from {v}.",
        "Merchants come to {s} for its {v}.",
    ),
    "place.people": (
        "{s} has {v} inhabitants.",
        "About {v} people live in {s}.",
        "The population of {s} is {v}.",
    ),
    "place.neighbour": (
        "The nearest town to {s} is {v}.",
        "An old road leads from {s} to {v}.",
        "{s} trades with its neighbour {v}.",
    ),
    "place.length": (
        "{s} is {v} long.",
        "The length of {s} is {v}.",
        "{s} flows for {v}.",
    ),
    "place.mouth": (
        "{s} reaches the sea at {v}.",
        "The mouth of {s} is at {v}.",
        "Boats go down {s} as far as {v}.",
    ),
    "place.height": (
        "{s} is {v} high.",
        "The height of {s} is {v}.",
        "{s} rises to {v}.",
    ),
    "place.above": (
        "{s} rises above the town of {v}.",
        "From {s} one looks down on {v}.",
        "Those who climb {s} start in {v}.",
    ),
    "place.area": (
        "{s} covers {v}.",
        "The area of {s} is {v}.",
        "{s} has a surface of {v}.",
    ),
    "place.near": (
        "{s} is close to the town of {v}.",
        "Visitors to {s} usually come from {v}.",
        "The town nearest to {s} is {v}.",
    ),
    "work.kind": (
        "{s} is {a} {v}.",
        "{s} is the name of {a} {v}.",
        "As {a} {v}, {s} has few equals.",
    ),
    "work.maker": (
        "{s} was made by {v}.",
        "{s} is the work of {v}.",
        "{v} created {s}.",
        "The creator of {s} was {v}.",
    ),
    "work.year": (
        "{s} was completed in {v}.",
        "{s} dates from {v}.",
        "The year of {s} is {v}.",
        "Work on {s} ended in {v}.",
    ),
    "work.town": (
        "{s} can be seen in {v}.",
        "{s} was made for the town of {v}.",
        "The home of {s} is {v}.",
        "Visitors find {s} in {v}.",
    ),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "person.profession": ("What was the profession of {s}?", "How did {s} earn a living?"),
    "person.born": ("When was {s} born?", "In which year was {s} born?"),
    "person.birthplace": ("Where was {s} born?", "What is the birthplace of {s}?"),
    "person.died": ("When did {s} die?", "In which year did {s} die?"),
    "person.lived": ("Where did {s} live and work?", "In which town did {s} settle?"),
    "person.teacher": ("Who taught {s}?", "Who was the teacher of {s}?"),
    "place.kind": ("What is {s}?", "What kind of place is {s}?"),
    "place.region": ("In which region is {s}?", "Where does {s} lie?"),
    "place.founded": ("When was {s} founded?", "In which year was {s} founded?"),
    "place.product": ("What is {s} famous for?", "What do merchants buy in {s}?"),
    "place.people": ("How many people live in {s}?", "What is the population of {s}?"),
    "place.neighbour": ("Which town is nearest to {s}?", "With which neighbour does {s} trade?"),
    "place.length": ("How long is {s}?", "What is the length of {s}?"),
    "place.mouth": ("Where does {s} reach the sea?", "Where is the mouth of {s}?"),
    "place.height": ("How high is {s}?", "What is the height of {s}?"),
    "place.above": ("Above which town does {s} rise?", "Where do those who climb {s} start?"),
    "place.area": ("How large is {s}?", "What is the area of {s}?"),
    "place.near": ("Which town is close to {s}?", "From which town do visitors to {s} come?"),
    "work.kind": ("What kind of work is {s}?", "What is {s}?"),
    "work.maker": ("Who made {s}?", "Who was the creator of {s}?"),
    "work.year": ("When was {s} completed?", "From which year is {s}?"),
    "work.town": ("Where can {s} be seen?", "In which town is {s}?"),
}

COMPARISONS: dict[str, tuple[str, ...]] = {
    "person.born": ("{low} is the older of the two.", "{high} was born later than {low}."),
    "person.died": ("{high} died later than {low}.", "{low} died before {high}."),
    "place.founded": ("{low} is the older town.", "{high} is younger than {low}."),
    "place.people": ("{high} is the larger town.", "Fewer people live in {low} than in {high}."),
    "place.length": ("{high} is the longer river.", "{low} is shorter than {high}."),
    "place.height": ("{high} is the higher mountain.", "{low} is lower than {high}."),
    "place.area": ("{high} is larger than {low}.", "{low} is the smaller of the two."),
    "work.year": ("{low} is the older work.", "{high} was made later than {low}."),
}
"""What follows from two values of one relation: ``{low}`` has the smaller, ``{high}`` the larger one."""
