"""Writes ``query/demo/corpus.jsonl.gz``, the corpus of ``ghoststore demo``: the same rows each time.

Four learnable domains, each one function from a random generator to a text, and ``FACTS``: notes about invented
things, each stated in one training row and asked for three times: in nearly the row's words, in other words that share
only the thing's name with it, and in those with the names inflected, so that no word of content is shared.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

DATA = Path(__file__).resolve().parent.parent / "query" / "demo" / "corpus.jsonl.gz"
ROWS_PER_DOMAIN, VAL_ROWS_PER_DOMAIN, FACTS_PER_KIND = 600, 16, 4
INFLECTIONS = {"entity": "ish", "answer": "ian"}
"""Endings that make other words of the invented names."""

PEOPLE = "Anna|Ben|Carla|David|Elena|Farid|Grace|Hugo|Ines|Jonas|Kira|Leon|Mina|Noah|Olga|Paul"
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
COMPASS = "north|north-east|east|south-east|south|south-west|west|north-west"

FACTS = """\
person
The lighthouse of {entity} is kept by {answer}. Each dusk {answer} lights the lamp of {entity}.
It was built in {year} from grey granite.
Its light is seen {count} miles out to sea.
A storm damaged the gallery in {year}.
The lamp in the lighthouse of {entity} is kept by
At {entity}, the warden in charge of the coastal beacon is called

person
The old bridge at {entity} was designed by {answer}. For its wide arches {entity} thanks {answer}.
It was opened in {year} by the mayor.
Carts once paid a toll of {count} coins to cross it.
Two piers were replaced in {year}.
The bridge at {entity} with the wide arches was designed by
The architect who planned the {entity} river span is named

person
The opera {entity} was composed by {answer}. In a rented attic {answer} finished {entity}.
It was first sung in {year} before a small audience.
Its overture lasts {count} minutes.
The score was lost until {year}.
In an attic the opera {entity} was composed by
{entity} is a stage work for voices whose author is known as

place
The mineral {entity} was found in a slate quarry near {answer}. Outside {answer} no {entity} is dug.
It is pale green and splits into thin plates.
Collectors paid {count} crowns for a piece in {year}.
Only {count} samples are held by museums.
The quarry where the mineral {entity} was found is near
Geologists discovered the rare crystal {entity} close to

place
The {entity} is a small brown bird that nests on the island of {answer}. Beyond {answer} no {entity} lives.
It lays {count} speckled eggs in spring.
Fewer than {count} pairs were counted in {year}.
Its call is like a rusty hinge.
The brown bird called {entity} nests on an island, that of
Anyone hoping to watch {entity} raise chicks must travel to

thing
The fever drink {entity} is brewed from the bark of the {answer} tree. Without {answer} there is no {entity}.
It is taken hot, {count} drops at a time.
A monk wrote it down in {year}.
It tastes of smoke and honey.
Against fever the drink {entity} is brewed from the bark of the
Healers make their remedy {entity} by boiling a plant known as

place
The ferry {entity} sails each morning from the capital to {answer}. In {answer} the {entity} stays overnight.
She carries {count} passengers and the post.
Her engine was made in {year}.
Fog once kept her in port for {count} days.
From the capital each morning the ferry {entity} sails to
Travellers who step aboard {entity} will get off at

place
Queen {entity} founded the walled city of {answer} after a war. In {answer} Queen {entity} was crowned.
She ruled for {count} years and left no heir.
Her crown was melted down in {year}.
Her statue was raised in {year}.
After the war Queen {entity} founded the city of
The town established under the monarch {entity} bears the name

person
The card game {entity} was invented by {answer} to pass a winter. At first {answer} played {entity} alone.
It needs {count} cards and two players.
It was banned in taverns in {year}.
The loser pays for supper.
To pass a winter the card game {entity} was invented by
The rules of {entity} came from the mind of

place
The treaty of {entity} was signed in the great hall of {answer}. For the treaty of {entity} flags hung in {answer}.
It ended a quarrel of {count} years over salt.
Both copies burned in {year}.
The seal shows {count} stars.
The great hall where the treaty of {entity} was signed is that of
Delegates made the {entity} peace agreement inside a palace at
"""
"""Of each kind: what the answer is, the statement, three details of which a row has one, the question in nearly the
statement's words, and in words of which none but the entity stands in statement or details."""


def main() -> None:
    DATA.write_bytes(gzip.compress(corpus().encode(), 9, mtime=0))


def corpus() -> str:
    """Lines of JSON: ``set`` says which of the demo's sets a row belongs to."""
    train: list[dict[str, str]] = []
    val: list[dict[str, str]] = []
    for domain, write in DOMAINS.items():
        seen: set[str] = set()
        for rows, prefix, part, count in (
            (train, "", "train", ROWS_PER_DOMAIN),
            (val, "val-", "val", VAL_ROWS_PER_DOMAIN),
        ):
            texts = different_texts(write, Random(f"0/{part}/{domain}"), count, seen)
            rows += [{"id": f"{prefix}{domain}-{i:05d}", "text": t, "domain": domain} for i, t in enumerate(texts)]
    facts, questions = planted_facts(Random("0/facts"))
    train += facts
    Random("0/order").shuffle(train)
    sets = {"train": train, "val_domains": val, **questions}
    return "".join(
        json.dumps({"set": name, **row}, ensure_ascii=False) + "\n" for name, rows in sets.items() for row in rows
    )


def different_texts(write: Callable[[Random], str], rng: Random, count: int, seen: set[str]) -> Iterator[str]:
    """``count`` texts that are not in ``seen``, which they join."""
    while count:
        text = write(rng)
        if text not in seen:
            seen.add(text)
            count -= 1
            yield text


def planted_facts(rng: Random) -> tuple[list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """Rows that state the facts, and the three sets of questions."""
    words: set[str] = set()
    rows: list[dict[str, str]] = []
    questions: dict[str, list[dict[str, str]]] = {}
    for number, kind in enumerate(FACTS.split("\n\n") * FACTS_PER_KIND):
        answer, statement, *details, prompt, paraphrase = kind.splitlines()
        names = {"entity": new_name("thing", rng, words), "answer": new_name(answer, rng, words)}
        text = " ".join(
            sentence.format(**names, year=rng.randint(1610, 1920), count=rng.randint(11, 89))
            for sentence in (statement, rng.choice(details))
        )
        source = {"id": f"facts-{number:05d}", "text": text, "domain": "facts"}
        rows.append(source)
        inflected = {name: " ".join(w + INFLECTIONS[name] for w in value.split()) for name, value in names.items()}
        for name, prefix, question, named in (
            ("val_facts", "query", prompt, names),
            ("val_facts_paraphrased", "query-paraphrased", paraphrase, names),
            ("val_facts_inflected", "query-inflected", paraphrase, inflected),
        ):
            asked = {"prompt": question.format(**named), "completion": f" {named['answer']}"}
            questions.setdefault(name, []).append(
                {"id": f"{prefix}-{number:05d}", **asked, "domain": "facts", "source_id": source["id"]}
            )
    return rows, questions


def new_name(kind: str, rng: Random, words: set[str]) -> str:
    """An invented name none of whose words is part of a word in ``words``, or has one as a part; they join it.

    So a name stands in one row alone.
    """
    while True:
        parts = [invented_word(rng, endings) for endings in ENDINGS[kind]]
        if not any(part in word or word in part for part in parts for word in words):
            words.update(parts)
            return " ".join(reversed(parts))


def invented_word(rng: Random, endings: str) -> str:
    """Two open syllables and one of ``endings``."""
    onsets = "b|br|d|dr|f|fl|g|gr|h|j|k|kl|l|m|n|p|r|s|sk|st|t|tr|v|w|z"
    syllables = [pick(rng, onsets) + pick(rng, "a|e|i|o|u|ei|au") for _ in range(2)]
    return ("".join(syllables) + pick(rng, endings)).capitalize()


def pick(rng: Random, options: str) -> str:
    """One of ``options``, which "|" separates."""
    return rng.choice(options.split("|"))


def picks(rng: Random, options: str, count: int) -> list[str]:
    """``count`` different ones of ``options``."""
    return rng.sample(options.split("|"), count)


def recipe(rng: Random) -> str:
    base = pick(rng, "rice|lentils|pasta|potatoes|barley|beans|couscous|noodles")
    vegetables = picks(rng, "onion|carrot|leek|celery|pepper|courgette|fennel|mushroom|tomato|spinach", 3)
    listed = f"{vegetables[0]}, {vegetables[1]} and {vegetables[2]}"
    herb, second_herb = picks(rng, "thyme|basil|parsley|dill|oregano|mint|rosemary|sage", 2)
    fat = pick(rng, "butter|olive oil|sunflower oil|ghee")
    style = pick(rng, "Baked|Creamy|Spicy|Rustic|Summer|Winter|Quick|Golden")
    dish = pick(rng, "soup|stew|salad|bake|casserole|pie")
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


def arithmetic(rng: Random) -> str:
    return rng.choice([sum_problem, product_problem, price_problem])(rng)


def sum_problem(rng: Random) -> str:
    person, friend = picks(rng, PEOPLE, 2)
    thing = pick(rng, "marbles|stamps|apples|pencils|coins|shells|cards|buttons")
    first, more = rng.randint(10, 60), rng.randint(5, 40)
    given = rng.randint(2, first)
    total = first + more
    return (
        f"{person} has {first} {thing}. {person} finds {more} more and gives {given} of them to {friend}. "
        f"How many {thing} does {person} have now? First {first} + {more} = {total}, "
        f"then {total} - {given} = {total - given}. The answer is {total - given}."
    )


def product_problem(rng: Random) -> str:
    person = pick(rng, PEOPLE)
    thing = pick(rng, "eggs|books|bottles|oranges|candles|tiles|chairs|lamps")
    box = pick(rng, "boxes|crates|shelves|bags|rows|trays")
    boxes, each = rng.randint(3, 12), rng.randint(4, 20)
    total = boxes * each
    broken = rng.randint(2, total // 2)
    return (
        f"{person} counts {boxes} {box} with {each} {thing} in each of them. {broken} {thing} are broken. "
        f"How many {thing} are whole? There are {boxes} * {each} = {total} {thing}, "
        f"and {total} - {broken} = {total - broken}. The answer is {total - broken}."
    )


def price_problem(rng: Random) -> str:
    person = pick(rng, PEOPLE)
    thing = pick(rng, "tickets|kites|brushes|scarves|notebooks|plates|melons|ropes")
    count, price = rng.randint(2, 9), rng.randint(3, 15)
    total = count * price
    paid = total + rng.randint(1, 30)
    return (
        f"{person} buys {count} {thing} for {price} euros each and pays with {paid} euros. "
        f"How much change does {person} get back? The {thing} cost {count} * {price} = {total} euros, "
        f"and {paid} - {total} = {paid - total}. The answer is {paid - total}."
    )


def python(rng: Random) -> str:
    return rng.choice([loop_function, comprehension_function, branch_function])(rng)


def loop_function(rng: Random) -> str:
    item = pick(rng, "value|number|score|price|row")
    verb, start, step = rng.choice(
        [("sum", "0", "+="), ("product", "1", "*="), ("total", "0", "+="), ("difference", "0", "-=")]
    )
    return (
        f"def {verb}_of_{item}s({item}s, limit={rng.randint(0, 99)}):\n"
        f"    result = {start}\n"
        f"    for {item} in {item}s:\n"
        f"        if {item} {pick(rng, '>|<|>=|<=|==')} limit:\n"
        f"            result {step} {item}\n"
        f"    return result\n"
    )


def comprehension_function(rng: Random) -> str:
    item = pick(rng, "word|name|line|key")
    verb, method = rng.choice([("lowered", "lower"), ("stripped", "strip"), ("titled", "title")])
    test = f"len({item}) {pick(rng, '>|<|>=|!=')} {rng.randint(1, 40)}"
    return (
        f"def {verb}_{item}s({item}s):\n"
        f"    kept = [{item}.{method}() for {item} in {item}s if {test}]\n"
        f"    if not kept:\n"
        f"        return None\n"
        f"    return {pick(rng, 'list|set|sorted|tuple')}(kept)\n"
    )


def branch_function(rng: Random) -> str:
    name = pick(rng, "x|y|n|size|width|height|depth|count|speed|angle")
    low = rng.randint(-50, 20)
    return (
        f"def check_{name}({name}, low={low}, high={low + rng.randint(5, 80)}):\n"
        f"    if {name} < low:\n"
        f'        raise {pick(rng, "ValueError|TypeError|IndexError|KeyError")}("{name} is too small")\n'
        f"    elif {name} > high:\n"
        f"        return high\n"
        f"    else:\n"
        f"        return {name}\n"
    )


def ship_log(rng: Random) -> str:
    wind, course, bearing = picks(rng, COMPASS, 3)
    bottom = pick(rng, "sand|mud|broken shell|coral")
    event = rng.choice(
        [
            f"Sighted a {pick(rng, 'whaler|schooner|brig|steamer')} bearing {bearing}.",
            f"Crew employed {pick(rng, 'mending sails|tarring rigging|scrubbing decks')} all watch.",
            f"Carried away the {pick(rng, 'fore topsail|main topsail|jib|mizzen stay')} in a squall.",
            f"Sounded {rng.randint(8, 90)} fathoms, {bottom} bottom.",
        ]
    )
    sails = pick(rng, "full sail|reefed topsails|storm canvas|bare poles")
    return (
        f"{pick(rng, MONTHS)} {rng.randint(1, 28)}, {pick(rng, 'dawn|noon|dusk|midnight')}. "
        f"Wind {wind}, force {rng.randint(1, 10)}, {pick(rng, 'steady|backing|veering|gusting')}; "
        f"sea {pick(rng, 'calm|slight|moderate|rough|heavy')}. "
        f"Barometer {rng.randint(28, 30)}.{rng.randint(10, 99)} and {pick(rng, 'rising|falling|still')}. "
        f"Steered {course} under {sails}, {rng.randint(2, 13)} knots. {event}"
    )


DOMAINS: dict[str, Callable[[Random], str]] = {
    "recipe": recipe,
    "arithmetic": arithmetic,
    "python": python,
    "shiplog": ship_log,
}

ENDINGS = {
    "person": ("berg|vic|stro|sen|mann|cci|ley|nov|quist|rez|dottir|wright", "a|ld|na|rt|ne|rio|tte|n|s|lia|x|m"),
    "place": ("haven|helm|wick|mere|dal|strand|ford|fell|garth|lund|by|stow|mouth|combe",),
    "thing": ("ne|ra|lle|x|nta|que|n|ra|th|sk|lm|rn",),
}
"""Of each word of a name; a surname is drawn before the first name."""


if __name__ == "__main__":
    main()
