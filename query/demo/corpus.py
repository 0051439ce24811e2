"""A small corpus of four learnable domains, with planted facts and queries that ask for them.

Each ordinary domain is one function from a random generator to a text, registered in ``DOMAINS``.
The fifth domain, ``facts``, is made of ``FACT_KINDS``: notes about invented things, each stated in one
training row, with a query in nearly the same words and a second one that shares only the thing's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ghoststore.errors import UsageError
from ghoststore.settings.measure import DemoOptions

Row = dict[str, str]

FACTS_PER_KIND = 4
_DRAWS_PER_ROW = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoCorpus:
    """Training rows and four validation sets; every ``id`` is unique in all five.

    ``train`` and ``val_domains`` hold ``{"id", "text", "domain"}``. The three sets of queries hold
    ``{"id", "prompt", "completion", "domain", "source_id"}``: ``prompt + completion`` is the text (the
    completion begins with its space), and ``source_id`` names the one training row that states it.
    """

    train: list[Row]
    val_domains: list[Row]
    val_facts: list[Row]
    val_facts_paraphrased: list[Row]
    val_facts_inflected: list[Row]
    """As the paraphrased ones, each invented name with an ending: no word of content stands in the source."""


def make_corpus(seed: int, rows: int = DemoOptions.rows, *, rows_per_domain: int = 16) -> DemoCorpus:
    """The corpus of a seed: ``rows`` ordinary rows plus the planted facts, in one shuffled list.

    ``rows`` is shared evenly between the domains; ``rows_per_domain`` held-out rows of each come on top.
    No two texts are equal, in training and validation together. Raises ``UsageError`` when a count is
    negative or larger than a domain's templates can fill with different rows.
    """
    if rows < 0 or rows_per_domain < 0:
        raise UsageError(f"row counts must be at least 0; found rows={rows}, rows_per_domain={rows_per_domain}")
    train: list[Row] = []
    val_domains: list[Row] = []
    for place, (domain, write) in enumerate(DOMAINS.items()):
        share = rows // len(DOMAINS) + (place < rows % len(DOMAINS))
        seen: set[str] = set()
        texts = _different_texts(write, Random(f"{seed}/train/{domain}"), share, seen, domain)
        held_out = _different_texts(write, Random(f"{seed}/val/{domain}"), rows_per_domain, seen, domain)
        train += [{"id": f"{domain}-{i:05d}", "text": t, "domain": domain} for i, t in enumerate(texts)]
        val_domains += [{"id": f"val-{domain}-{i:05d}", "text": t, "domain": domain} for i, t in enumerate(held_out)]
    facts, plain, paraphrased, inflected = _facts(Random(f"{seed}/facts"))
    train += facts
    Random(f"{seed}/order").shuffle(train)
    return DemoCorpus(
        train=train,
        val_domains=val_domains,
        val_facts=plain,
        val_facts_paraphrased=paraphrased,
        val_facts_inflected=inflected,
    )


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line (UTF-8), replacing the file."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _different_texts(write: Callable[[Random], str], rng: Random, count: int, seen: set[str], domain: str) -> list[str]:
    """``count`` texts that are not in ``seen``, which they join."""
    texts: list[str] = []
    for _ in range(_DRAWS_PER_ROW * count):
        if len(texts) == count:
            break
        text = write(rng)
        if text not in seen:
            seen.add(text)
            texts.append(text)
    if len(texts) < count:
        raise UsageError(
            f"domain {domain!r}: {count} different rows asked for, its templates gave {len(texts)}; ask for fewer rows"
        )
    return texts


# --- Ordinary domains -----------------------------------------------------------------------------

_PEOPLE = "Anna|Ben|Carla|David|Elena|Farid|Grace|Hugo|Ines|Jonas|Kira|Leon|Mina|Noah|Olga|Paul"
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_COMPASS = "north|north-east|east|south-east|south|south-west|west|north-west"


def _pick(rng: Random, options: str) -> str:
    """One of ``options``, which "|" separates."""
    return rng.choice(options.split("|"))


def _picks(rng: Random, options: str, count: int) -> list[str]:
    """``count`` different ones of ``options``."""
    return rng.sample(options.split("|"), count)


def _recipe(rng: Random) -> str:
    base = _pick(rng, "rice|lentils|pasta|potatoes|barley|beans|couscous|noodles")
    vegetables = _picks(rng, "onion|carrot|leek|celery|pepper|courgette|fennel|mushroom|tomato|spinach", 3)
    listed = f"{vegetables[0]}, {vegetables[1]} and {vegetables[2]}"
    herb, second_herb = _picks(rng, "thyme|basil|parsley|dill|oregano|mint|rosemary|sage", 2)
    fat = _pick(rng, "butter|olive oil|sunflower oil|ghee")
    style = _pick(rng, "Baked|Creamy|Spicy|Rustic|Summer|Winter|Quick|Golden")
    dish = _pick(rng, "soup|stew|salad|bake|casserole|pie")
    start = rng.choice(
        [
            f"Chop the {listed} and fry them gently in the {fat} for {rng.randint(4, 12)} minutes.",
            f"Heat the {fat} in a wide pan, add the sliced {listed} and stir until soft.",
            f"Roast the {listed} with the {fat} in a hot oven until they are brown.",
        ]
    )
    middle = rng.choice(
        [
            f"Add the {base} and {rng.randint(2, 9)} cups of stock, then simmer over low heat.",
            f"Stir in the {base}, pour over the stock and cover with a lid.",
            f"Tip in the boiled {base} with a pinch of salt and mix well.",
        ]
    )
    end = rng.choice(
        [
            f"Sprinkle with {herb} and serve warm with bread.",
            f"Season with {herb}, {second_herb} and black pepper.",
            f"Finish with chopped {herb} and a spoon of yoghurt.",
        ]
    )
    return (
        f"{style} {base} {dish} with {vegetables[0]}. Serves {rng.randint(2, 8)}. "
        f"You need {rng.randrange(100, 500, 25)} g {base}, {listed}, {fat} and {herb}. "
        f"{start} {middle} {end}"
    )


def _arithmetic(rng: Random) -> str:
    return rng.choice([_sum_problem, _product_problem, _price_problem])(rng)


def _sum_problem(rng: Random) -> str:
    person, friend = _picks(rng, _PEOPLE, 2)
    thing = _pick(rng, "marbles|stamps|apples|pencils|coins|shells|cards|buttons")
    first, more = rng.randint(10, 60), rng.randint(5, 40)
    given = rng.randint(2, first)
    total = first + more
    return (
        f"{person} has {first} {thing}. {person} finds {more} more and gives {given} of them to {friend}. "
        f"How many {thing} does {person} have now? First {first} + {more} = {total}, "
        f"then {total} - {given} = {total - given}. The answer is {total - given}."
    )


def _product_problem(rng: Random) -> str:
    person = _pick(rng, _PEOPLE)
    thing = _pick(rng, "eggs|books|bottles|oranges|candles|tiles|chairs|lamps")
    box = _pick(rng, "boxes|crates|shelves|bags|rows|trays")
    boxes, each = rng.randint(3, 12), rng.randint(4, 20)
    total = boxes * each
    broken = rng.randint(2, total // 2)
    return (
        f"{person} counts {boxes} {box} with {each} {thing} in each of them. {broken} {thing} are broken. "
        f"How many {thing} are whole? There are {boxes} * {each} = {total} {thing}, "
        f"and {total} - {broken} = {total - broken}. The answer is {total - broken}."
    )


def _price_problem(rng: Random) -> str:
    person = _pick(rng, _PEOPLE)
    thing = _pick(rng, "tickets|kites|brushes|scarves|notebooks|plates|melons|ropes")
    count, price = rng.randint(2, 9), rng.randint(3, 15)
    total = count * price
    paid = total + rng.randint(1, 30)
    return (
        f"{person} buys {count} {thing} for {price} euros each and pays with {paid} euros. "
        f"How much change does {person} get back? The {thing} cost {count} * {price} = {total} euros, "
        f"and {paid} - {total} = {paid - total}. The answer is {paid - total}."
    )


def _python(rng: Random) -> str:
    return rng.choice([_loop_function, _comprehension_function, _branch_function])(rng)


def _loop_function(rng: Random) -> str:
    item = _pick(rng, "value|number|score|price|row")
    verb, start, step = rng.choice(
        [("sum", "0", "+="), ("product", "1", "*="), ("total", "0", "+="), ("difference", "0", "-=")]
    )
    return (
        f"def {verb}_of_{item}s({item}s, limit={rng.randint(0, 99)}):\n"
        f"    result = {start}\n"
        f"    for {item} in {item}s:\n"
        f"        if {item} {_pick(rng, '>|<|>=|<=|==')} limit:\n"
        f"            result {step} {item}\n"
        f"    return result\n"
    )


def _comprehension_function(rng: Random) -> str:
    item = _pick(rng, "word|name|line|key")
    verb, method = rng.choice([("lowered", "lower"), ("stripped", "strip"), ("titled", "title")])
    test = f"len({item}) {_pick(rng, '>|<|>=|!=')} {rng.randint(1, 40)}"
    return (
        f"def {verb}_{item}s({item}s):\n"
        f"    kept = [{item}.{method}() for {item} in {item}s if {test}]\n"
        f"    if not kept:\n"
        f"        return None\n"
        f"    return {_pick(rng, 'list|set|sorted|tuple')}(kept)\n"
    )


def _branch_function(rng: Random) -> str:
    name = _pick(rng, "x|y|n|size|width|height|depth|count|speed|angle")
    low = rng.randint(-50, 20)
    return (
        f"def check_{name}({name}, low={low}, high={low + rng.randint(5, 80)}):\n"
        f"    if {name} < low:\n"
        f'        raise {_pick(rng, "ValueError|TypeError|IndexError|KeyError")}("{name} is too small")\n'
        f"    elif {name} > high:\n"
        f"        return high\n"
        f"    else:\n"
        f"        return {name}\n"
    )


def _ship_log(rng: Random) -> str:
    wind, course, bearing = _picks(rng, _COMPASS, 3)
    bottom = _pick(rng, "sand|mud|broken shell|coral")
    event = rng.choice(
        [
            f"Sighted a {_pick(rng, 'whaler|schooner|brig|steamer')} bearing {bearing}.",
            f"Crew employed {_pick(rng, 'mending sails|tarring rigging|scrubbing decks')} all watch.",
            f"Carried away the {_pick(rng, 'fore topsail|main topsail|jib|mizzen stay')} in a squall.",
            f"Sounded {rng.randint(8, 90)} fathoms, {bottom} bottom.",
        ]
    )
    sails = _pick(rng, "full sail|reefed topsails|storm canvas|bare poles")
    return (
        f"{_pick(rng, _MONTHS)} {rng.randint(1, 28)}, {_pick(rng, 'dawn|noon|dusk|midnight')}. "
        f"Wind {wind}, force {rng.randint(1, 10)}, {_pick(rng, 'steady|backing|veering|gusting')}; "
        f"sea {_pick(rng, 'calm|slight|moderate|rough|heavy')}. "
        f"Barometer {rng.randint(28, 30)}.{rng.randint(10, 99)} and {_pick(rng, 'rising|falling|still')}. "
        f"Steered {course} under {sails}, {rng.randint(2, 13)} knots. {event}"
    )


DOMAINS: dict[str, Callable[[Random], str]] = {
    "recipe": _recipe,
    "arithmetic": _arithmetic,
    "python": _python,
    "shiplog": _ship_log,
}


# --- Planted facts --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class FactKind:
    """How one sort of fact is stated and asked for, with ``{entity}`` and ``{answer}`` invented.

    ``statement``, which names both twice, and one of ``details`` make the training row. ``prompt`` asks
    in nearly the same words, ``paraphrase`` in words of which none but the entity stands in ``statement``
    or ``details``.
    """

    answer: Callable[[Random], str]
    statement: str
    details: tuple[str, str, str]
    prompt: str
    paraphrase: str


def _word(rng: Random, endings: str) -> str:
    """An invented name of two open syllables and one of ``endings``."""
    onsets = "b|br|d|dr|f|fl|g|gr|h|j|k|kl|l|m|n|p|r|s|sk|st|t|tr|v|w|z"
    syllables = [_pick(rng, onsets) + _pick(rng, "a|e|i|o|u|ei|au") for _ in range(2)]
    return ("".join(syllables) + _pick(rng, endings)).capitalize()


def _place(rng: Random) -> str:
    return _word(rng, "haven|helm|wick|mere|dal|strand|ford|fell|garth|lund|by|stow|mouth|combe")


def _person(rng: Random) -> str:
    surname = _word(rng, "berg|vic|stro|sen|mann|cci|ley|nov|quist|rez|dottir|wright")
    return f"{_word(rng, 'a|ld|na|rt|ne|rio|tte|n|s|lia|x|m')} {surname}"


def _thing(rng: Random) -> str:
    return _word(rng, "ne|ra|lle|x|nta|que|n|ra|th|sk|lm|rn")


FACT_KINDS = (
    FactKind(
        answer=_person,
        statement=("The lighthouse of {entity} is kept by {answer}. Each dusk {answer} lights the lamp of {entity}."),
        details=(
            "It was built in {year} from grey granite.",
            "Its light is seen {count} miles out to sea.",
            "A storm damaged the gallery in {year}.",
        ),
        prompt="The lamp in the lighthouse of {entity} is kept by",
        paraphrase="At {entity}, the warden in charge of the coastal beacon is called",
    ),
    FactKind(
        answer=_person,
        statement=(
            "The old bridge at {entity} was designed by {answer}. For its wide arches {entity} thanks {answer}."
        ),
        details=(
            "It was opened in {year} by the mayor.",
            "Carts once paid a toll of {count} coins to cross it.",
            "Two piers were replaced in {year}.",
        ),
        prompt="The bridge at {entity} with the wide arches was designed by",
        paraphrase="The architect who planned the {entity} river span is named",
    ),
    FactKind(
        answer=_person,
        statement=("The opera {entity} was composed by {answer}. In a rented attic {answer} finished {entity}."),
        details=(
            "It was first sung in {year} before a small audience.",
            "Its overture lasts {count} minutes.",
            "The score was lost until {year}.",
        ),
        prompt="In an attic the opera {entity} was composed by",
        paraphrase="{entity} is a stage work for voices whose author is known as",
    ),
    FactKind(
        answer=_place,
        statement=(
            "The mineral {entity} was found in a slate quarry near {answer}. Outside {answer} no {entity} is dug."
        ),
        details=(
            "It is pale green and splits into thin plates.",
            "Collectors paid {count} crowns for a piece in {year}.",
            "Only {count} samples are held by museums.",
        ),
        prompt="The quarry where the mineral {entity} was found is near",
        paraphrase="Geologists discovered the rare crystal {entity} close to",
    ),
    FactKind(
        answer=_place,
        statement=(
            "The {entity} is a small brown bird that nests on the island of {answer}. "
            "Beyond {answer} no {entity} lives."
        ),
        details=(
            "It lays {count} speckled eggs in spring.",
            "Fewer than {count} pairs were counted in {year}.",
            "Its call is like a rusty hinge.",
        ),
        prompt="The brown bird called {entity} nests on an island, that of",
        paraphrase="Anyone hoping to watch {entity} raise chicks must travel to",
    ),
    FactKind(
        answer=_thing,
        statement=(
            "The fever drink {entity} is brewed from the bark of the {answer} tree. "
            "Without {answer} there is no {entity}."
        ),
        details=(
            "It is taken hot, {count} drops at a time.",
            "A monk wrote it down in {year}.",
            "It tastes of smoke and honey.",
        ),
        prompt="Against fever the drink {entity} is brewed from the bark of the",
        paraphrase="Healers make their remedy {entity} by boiling a plant known as",
    ),
    FactKind(
        answer=_place,
        statement=(
            "The ferry {entity} sails each morning from the capital to {answer}. "
            "In {answer} the {entity} stays overnight."
        ),
        details=(
            "She carries {count} passengers and the post.",
            "Her engine was made in {year}.",
            "Fog once kept her in port for {count} days.",
        ),
        prompt="From the capital each morning the ferry {entity} sails to",
        paraphrase="Travellers who step aboard {entity} will get off at",
    ),
    FactKind(
        answer=_place,
        statement=(
            "Queen {entity} founded the walled city of {answer} after a war. In {answer} Queen {entity} was crowned."
        ),
        details=(
            "She ruled for {count} years and left no heir.",
            "Her crown was melted down in {year}.",
            "Her statue was raised in {year}.",
        ),
        prompt="After the war Queen {entity} founded the city of",
        paraphrase="The town established under the monarch {entity} bears the name",
    ),
    FactKind(
        answer=_person,
        statement=(
            "The card game {entity} was invented by {answer} to pass a winter. At first {answer} played {entity} alone."
        ),
        details=(
            "It needs {count} cards and two players.",
            "It was banned in taverns in {year}.",
            "The loser pays for supper.",
        ),
        prompt="To pass a winter the card game {entity} was invented by",
        paraphrase="The rules of {entity} came from the mind of",
    ),
    FactKind(
        answer=_place,
        statement=(
            "The treaty of {entity} was signed in the great hall of {answer}. "
            "For the treaty of {entity} flags hung in {answer}."
        ),
        details=(
            "It ended a quarrel of {count} years over salt.",
            "Both copies burned in {year}.",
            "The seal shows {count} stars.",
        ),
        prompt="The great hall where the treaty of {entity} was signed is that of",
        paraphrase="Delegates made the {entity} peace agreement inside a palace at",
    ),
)


INFLECTIONS = {"entity": "ish", "answer": "ian"}
"""Endings that make other words of the invented names."""


def _facts(rng: Random) -> tuple[list[Row], list[Row], list[Row], list[Row]]:
    """Rows that state the facts; queries in nearly their words, in other words, and in others with inflected names.

    No invented word is part of another, so that a name stands in one row alone.
    """
    words: set[str] = set()
    rows: list[Row] = []
    plain: list[Row] = []
    paraphrased: list[Row] = []
    inflected: list[Row] = []
    for kind in FACT_KINDS * FACTS_PER_KIND:
        number = len(rows)
        names = {"entity": _new_name(_thing, rng, words), "answer": _new_name(kind.answer, rng, words)}
        sentences = (kind.statement, rng.choice(kind.details))
        text = " ".join(
            sentence.format(**names, year=rng.randint(1610, 1920), count=rng.randint(11, 89)) for sentence in sentences
        )
        row = {"id": f"facts-{number:05d}", "text": text, "domain": "facts"}
        rows.append(row)
        other = {name: " ".join(word + INFLECTIONS[name] for word in value.split()) for name, value in names.items()}
        for queries, prompt, prefix, named in (
            (plain, kind.prompt, "query", names),
            (paraphrased, kind.paraphrase, "query-paraphrased", names),
            (inflected, kind.paraphrase, "query-inflected", other),
        ):
            queries.append(
                {
                    "id": f"{prefix}-{number:05d}",
                    "prompt": prompt.format(**named),
                    "completion": f" {named['answer']}",
                    "domain": "facts",
                    "source_id": row["id"],
                }
            )
    return rows, plain, paraphrased, inflected


def _new_name(draw: Callable[[Random], str], rng: Random, words: set[str]) -> str:
    """A name none of whose words is part of a word in ``words``, or has one as a part; they join it."""
    while True:
        name = draw(rng)
        parts = name.split()
        if not any(part in word or word in part for part in parts for word in words):
            words.update(parts)
            return name
