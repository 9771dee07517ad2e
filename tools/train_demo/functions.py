"""Functions that may be called, and the questions that need them: what the dialogs about tools are made of.

Most values and many names are made up letter by letter, so that the model learns to copy what it is given instead of
knowing it. What is `held` out is asked in the examination only: functions, phrases, places and names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from words import CAPITALS, NUMBERS

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter: the names that it goes by, what it takes, and the options of an enum."""

    key: str
    kind: str  # of KINDS, or "enum"
    names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def name(self, rng: random.Random) -> str:
        return rng.choice((self.key, *self.names))


@dataclass(frozen=True, slots=True)
class Family:
    """One thing that functions do, under any of its names. A part of a question in brackets is for a parameter that may
    be missing."""

    names: tuple[str, ...]
    about: tuple[str, ...]
    slots: tuple[Slot, ...]
    asks: tuple[str, ...]
    held: tuple[str, ...] = ()  # phrases that only the examination has


def _unit(*options: str) -> Slot:
    return Slot("unit", "enum", ("units", "scale"), options)


PLACE = Slot("city", "place", ("location", "place", "town", "where", "city_name"))
PERSON = Slot("name", "person", ("person", "user", "who", "contact"))
A, B = Slot("a", "integer", ("x", "first", "num1", "left")), Slot("b", "integer", ("y", "second", "num2", "right"))

FAMILIES = (
    Family(
        ("get_weather", "weather", "get_current_weather", "fetch_weather", "weather_forecast", "check_weather"),
        ("Get the weather", "Current weather for a city", "Returns the weather in a given location", ""),
        (PLACE, _unit("celsius", "fahrenheit")),
        (
            "What is the weather in {city}[ in {unit}]?",
            "What's the weather like in {city}[ in {unit}]?",
            "How is the weather in {city} today[ in {unit}]?",
            "Weather in {city}[ in {unit}]",
            "Tell me the weather in {city}[, in {unit}].",
            "Is it raining in {city}?",
            "Will it rain in {city} tomorrow?",
            "How warm is it in {city}[ in {unit}]?",
            "What is the temperature in {city}[ in {unit}]?",
            "Do I need an umbrella in {city}?",
            "Give me the weather for {city}[ in {unit}]",
            "{city} weather[ in {unit}]",
        ),
        (
            "Please check the weather in {city}[ in {unit}].",
            "How's the weather in {city} right now[ in {unit}]?",
            "Could you tell me the weather for {city}[ in {unit}]?",
            "What will the weather be in {city} tomorrow[ in {unit}]?",
        ),
    ),
    Family(
        ("get_time", "current_time", "time_in", "get_current_time", "local_time"),
        ("Get the current time", "Time in a city", ""),
        (PLACE,),
        (
            "What time is it in {city}?",
            "What is the time in {city}?",
            "Current time in {city}",
            "How late is it in {city}?",
        ),
        ("Tell me the time in {city}.", "Do you know what time it is in {city}?"),
    ),
    Family(
        ("get_stock_price", "stock_price", "get_stock", "lookup_stock", "get_quote"),
        ("Get the price of a stock", "Current stock price", ""),
        (Slot("symbol", "ticker", ("ticker", "stock", "company")),),
        (
            "What is the stock price of {symbol}?",
            "How much is {symbol} stock?",
            "Price of {symbol} stock",
            "What is {symbol} trading at?",
            "Look up the stock {symbol}.",
        ),
        ("Get me the stock price for {symbol}.", "How is the {symbol} stock today?"),
    ),
    Family(
        ("send_email", "email", "write_email", "send_mail"),
        ("Send an email", "Sends a mail to somebody", ""),
        (
            Slot("to", "address", ("recipient", "address", "email")),
            Slot("subject", "phrase", ("text", "body", "message")),
        ),
        (
            "Send an email to {to}[ saying {subject}].",
            "Email {to}[: {subject}]",
            "Write an email to {to}[ about {subject}].",
            "Please mail {to}[ about {subject}]",
        ),
        ("Can you send {to} an email[ about {subject}]?",),
    ),
    Family(
        ("search", "web_search", "search_web", "google", "search_internet"),
        ("Search the web", "Find something on the internet", ""),
        (
            Slot("query", "phrase", ("q", "text", "search_query")),
            Slot("limit", "integer", ("max_results", "count", "k")),
        ),
        (
            "Search the web for {query}[ with {limit} results].",
            "Search for {query}[, {limit} results]",
            "Find {query} on the web.",
            "Look up {query} on the internet.",
            "google {query}",
        ),
        ("Can you search the internet for {query}?", "Please do a web search for {query}."),
    ),
    Family(
        ("set_timer", "start_timer", "timer", "create_timer"),
        ("Set a timer", "Start a timer of some minutes", ""),
        (Slot("minutes", "integer", ("duration", "time", "length")),),
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes",
            "Timer {minutes} minutes",
            "I need a timer for {minutes} minutes.",
            "Set a {minutes} minute timer.",
        ),
        ("Can you start a {minutes} minute timer?",),
    ),
    Family(
        ("create_reminder", "remind", "add_reminder", "set_reminder"),
        ("Create a reminder", "Remind the user of something", ""),
        (Slot("text", "phrase", ("title", "message", "what")), Slot("day", "day", ("date", "when", "due"))),
        (
            "Remind me of {text}[ on {day}].",
            "Set a reminder for {text}[ on {day}].",
            "Create a reminder: {text}[ on {day}]",
            "Add a reminder about {text}[ for {day}]",
        ),
        ("Please remind me about {text}[ on {day}].",),
    ),
    Family(
        ("play_music", "play_song", "play", "start_music"),
        ("Play music", "Play a song", ""),
        (Slot("song", "title", ("title", "track", "name")), Slot("artist", "person", ("by", "singer", "band"))),
        (
            "Play {song}[ by {artist}].",
            "Play the song {song}[ by {artist}]",
            "I want to hear {song}[ by {artist}].",
            "Put on {song}[ by {artist}]",
        ),
        ("Can you play {song}[ by {artist}]?",),
    ),
    Family(
        ("translate", "translate_text", "translation"),
        ("Translate a text", "Translate text into another language", ""),
        (
            Slot("text", "phrase", ("phrase", "sentence", "words")),
            Slot("language", "language", ("target_language", "target", "to", "lang")),
        ),
        (
            "Translate {text} to {language}.",
            "Translate {text} into {language}",
            "How do you say {text} in {language}?",
            "What is {text} in {language}?",
            "Say {text} in {language}.",
        ),
        ("Please translate {text} to {language}.", "Can you translate {text} into {language}?"),
    ),
    Family(
        ("convert_currency", "currency", "exchange", "convert_money"),
        ("Convert money", "Convert an amount from one currency to another", ""),
        (
            Slot("amount", "number", ("value", "money", "sum")),
            Slot("from", "currency", ("from_currency", "source", "base")),
            Slot("to", "currency", ("to_currency", "target", "into")),
        ),
        (
            "Convert {amount} {from} to {to}.",
            "How much is {amount} {from} in {to}?",
            "{amount} {from} to {to}",
            "What are {amount} {from} in {to}?",
            "Exchange {amount} {from} into {to}",
        ),
        ("Please convert {amount} {from} into {to}.",),
    ),
    Family(
        ("find_flights", "book_flight", "search_flights", "flights", "get_flights"),
        ("Find flights", "Flights between two cities", "Book a flight", ""),
        (
            Slot("origin", "place", ("from", "departure", "from_city", "source")),
            Slot("destination", "place", ("to", "arrival", "to_city", "target")),
            Slot("date", "day", ("day", "when")),
        ),
        (
            "Find flights from {origin} to {destination}[ on {date}].",
            "I want to fly from {origin} to {destination}[ on {date}].",
            "Book a flight from {origin} to {destination}[ for {date}]",
            "Flights from {origin} to {destination}[ on {date}]",
            "Is there a flight from {origin} to {destination}[ on {date}]?",
            "Book me a flight to {destination} from {origin}[ on {date}].",
        ),
        ("Show me flights from {origin} to {destination}[ on {date}].",),
    ),
    Family(
        ("book_hotel", "find_hotel", "search_hotels", "hotels"),
        ("Book a hotel", "Find a hotel in a city", ""),
        (PLACE, Slot("nights", "integer", ("days", "stay", "duration"))),
        (
            "Book a hotel in {city}[ for {nights} nights].",
            "Find a hotel in {city}[ for {nights} nights]",
            "I need a hotel in {city}[ for {nights} nights].",
            "Hotels in {city}[ for {nights} nights]",
        ),
        ("Please find me a hotel in {city}[ for {nights} nights].",),
    ),
    Family(
        ("book_table", "reserve_table", "make_reservation", "book_restaurant"),
        ("Book a table", "Reserve a table in a restaurant", ""),
        (
            Slot("restaurant", "title", ("place", "name", "where")),
            Slot("people", "integer", ("guests", "party_size", "persons", "number")),
        ),
        (
            "Book a table at {restaurant}[ for {people} people].",
            "Reserve a table at {restaurant}[ for {people}]",
            "I need a table at {restaurant}[ for {people} people].",
            "Table for {people} at {restaurant}",
            "Make a reservation at {restaurant}[ for {people} people].",
        ),
        ("Can you reserve a table for {people} people at {restaurant}?",),
    ),
    Family(
        ("set_light", "light", "control_light", "switch_light", "lights"),
        ("Switch a light", "Turn the light in a room on or off", ""),
        (
            Slot("room", "room", ("location", "place", "where")),
            Slot("state", "enum", ("action", "power"), ("on", "off")),
        ),
        (
            "Turn {state} the light in the {room}.",
            "Switch {state} the {room} light",
            "Turn the light in the {room} {state}.",
            "Light {state} in the {room}",
        ),
        ("Please switch the light in the {room} {state}.",),
    ),
    Family(
        ("set_temperature", "set_thermostat", "thermostat", "heating"),
        ("Set the temperature of a room", "Control the heating", ""),
        (Slot("temperature", "integer", ("degrees", "value", "target")), Slot("room", "room", ("where", "zone"))),
        (
            "Set the temperature to {temperature} degrees[ in the {room}].",
            "Set the thermostat to {temperature}[ in the {room}]",
            "Make it {temperature} degrees[ in the {room}].",
            "Heat[ the {room}] to {temperature} degrees",
        ),
        ("Please set the heating to {temperature} degrees[ in the {room}].",),
    ),
    Family(
        ("add", "sum", "add_numbers", "plus", "calculate_sum"),
        ("Add two numbers", "Returns a plus b", ""),
        (A, B),
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "{a} + {b}",
            "What is the sum of {a} and {b}?",
            "Calculate {a} + {b}",
        ),
        ("How much is {a} plus {b}?", "Please add {a} and {b}."),
    ),
    Family(
        ("multiply", "times", "product", "multiply_numbers", "mul"),
        ("Multiply two numbers", "Returns a times b", ""),
        (A, B),
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b}", "What is the product of {a} and {b}?"),
        ("How much is {a} times {b}?", "Please multiply {a} and {b}."),
    ),
    Family(
        ("get_distance", "distance", "route", "get_route", "directions"),
        ("Distance between two places", "Find the way", ""),
        (
            Slot("from", "place", ("start", "origin", "a")),
            Slot("to", "place", ("end", "destination", "b")),
            Slot("mode", "enum", ("by", "means"), ("car", "train", "bike")),
        ),
        (
            "How far is it from {from} to {to}[ by {mode}]?",
            "What is the distance from {from} to {to}[ by {mode}]?",
            "How do I get from {from} to {to}[ by {mode}]?",
            "Distance between {from} and {to}[ by {mode}]",
            "Show me the way from {from} to {to}[ by {mode}].",
        ),
        ("What is the distance between {from} and {to}[ by {mode}]?",),
    ),
    Family(
        ("get_news", "news", "latest_news", "headlines"),
        ("Get the news", "Latest news about a topic", ""),
        (Slot("topic", "word", ("about", "subject", "query")), Slot("limit", "integer", ("count", "n"))),
        (
            "What is the news about {topic}?",
            "Show me {limit} news about {topic}",
            "News about {topic}",
            "Any news on {topic}?",
        ),
        ("Tell me the latest news about {topic}.",),
    ),
    Family(
        ("get_recipe", "find_recipe", "recipe", "cook"),
        ("Find a recipe", "A recipe for a dish", ""),
        (Slot("dish", "word", ("food", "meal", "name")), Slot("people", "integer", ("servings", "persons"))),
        (
            "How do I cook {dish}[ for {people} people]?",
            "Give me a recipe for {dish}[ for {people} people].",
            "Find a recipe for {dish}[ for {people}]",
            "I want to cook {dish}[ for {people} people].",
        ),
        ("Show me a recipe for {dish}[ for {people} people].",),
    ),
    Family(
        ("get_population", "population", "count_people", "inhabitants"),
        ("Population of a city", "How many people live in a place", ""),
        (PLACE,),
        ("How many people live in {city}?", "What is the population of {city}?", "Population of {city}"),
        ("Tell me the population of {city}.",),
    ),
    Family(
        ("define", "get_definition", "dictionary", "define_word"),
        ("Define a word", "Look a word up in the dictionary", ""),
        (Slot("word", "word", ("term", "text")),),
        ("What does {word} mean?", "Define {word}.", "What is the meaning of {word}?", "Look up the word {word}"),
        ("What is the definition of {word}?",),
    ),
    Family(
        ("get_user", "find_user", "lookup_user", "user_info"),
        ("Find a user by id", "User data", ""),
        (Slot("id", "integer", ("user_id", "number", "key")),),
        ("Who is user {id}?", "Find user {id}.", "Show user {id}", "Get the user with id {id}"),
        ("Look up user {id}, please.",),
    ),
    Family(
        ("order_status", "get_order", "track_order", "check_order"),
        ("Status of an order", "Track an order", ""),
        (Slot("order_id", "code", ("id", "order", "number")),),
        (
            "Where is my order {order_id}?",
            "What is the status of order {order_id}?",
            "Track order {order_id}",
            "Order {order_id}",
        ),
        ("Can you check order {order_id}?",),
    ),
    Family(
        ("create_event", "add_event", "schedule_meeting", "calendar", "new_event"),
        ("Create an event in the calendar", "Schedule a meeting", ""),
        (
            Slot("title", "phrase", ("name", "event", "summary")),
            Slot("day", "day", ("date", "when")),
            Slot("hour", "integer", ("time", "start", "at")),
        ),
        (
            "Schedule {title} on {day}[ at {hour}].",
            "Create an event {title} for {day}[ at {hour}]",
            "Add {title} to my calendar on {day}[ at {hour}].",
            "Plan a meeting {title} on {day}[ at {hour}]",
        ),
        ("Please put {title} into my calendar on {day}[ at {hour}].",),
    ),
    Family(
        ("set_volume", "volume", "change_volume"),
        ("Set the volume", "How loud it plays", ""),
        (Slot("level", "integer", ("volume", "value", "percent")),),
        ("Set the volume to {level}.", "Volume {level}", "Turn the volume to {level}", "Make it {level} percent loud."),
        ("Please change the volume to {level}.",),
    ),
    Family(
        ("roll_dice", "throw_dice", "dice"),
        ("Roll dice", "Throw a number of dice", ""),
        (Slot("count", "integer", ("number", "n", "dice")),),
        ("Roll {count} dice.", "Throw {count} dice", "Please roll {count} dice for me.", "I want to roll {count} dice"),
        ("Can you throw {count} dice?",),
    ),
    Family(
        ("tell_joke", "get_joke", "joke"),
        ("Tell a joke", "A funny joke", ""),
        (),
        ("Tell me a joke.", "Do you know a joke?", "I want to hear a joke", "A joke, please!"),
        ("Can you tell a joke?",),
    ),
    Family(
        ("get_date", "today", "current_date", "date_today"),
        ("The date of today", "Get the current date", ""),
        (),
        ("What day is it today?", "What is the date?", "What is today's date?", "Which date is today?"),
        ("Tell me the date of today.",),
    ),
)

HELD_FAMILIES = (
    Family(
        ("get_humidity", "humidity"),
        ("Get the humidity", ""),
        (PLACE,),
        ("What is the humidity in {city}?", "How is the humidity in {city}?"),
    ),
    Family(
        ("get_air_quality", "air_quality"),
        ("Air quality of a city",),
        (PLACE,),
        ("How is the air quality in {city}?", "Tell me the air quality in {city}."),
    ),
    Family(
        ("subtract",),
        ("Subtract a number",),
        (Slot("number", "integer", ("amount",)), Slot("from", "integer", ("from_number",))),
        ("Subtract {number} from {from}.", "Please subtract {number} from {from}"),
    ),
    Family(("minus",), ("One number minus another",), (A, B), ("What is {a} minus {b}?", "{a} minus {b}")),
    Family(("divide",), ("Divide two numbers",), (A, B), ("Divide {a} by {b}.", "Please divide {a} by {b}")),
    Family(
        ("set_alarm", "alarm"),
        ("Set an alarm",),
        (Slot("hour", "integer", ("time",)),),
        ("Set an alarm for {hour}.", "I need an alarm at {hour}"),
    ),
    Family(
        ("send_message", "message"),
        ("Send a message",),
        (Slot("to", "person", ("recipient", "contact")), Slot("text", "phrase", ("message",))),
        ("Send a message to {to} saying {text}.", "Send {to} the message {text}"),
    ),
    Family(
        ("order_pizza", "pizza"),
        ("Order a pizza",),
        (Slot("size", "enum", (), ("small", "medium", "large")), Slot("count", "integer", ("number",))),
        ("Order {count} {size} pizza.", "I want {count} {size} pizzas"),
    ),
    Family(
        ("track_package", "package_status"),
        ("Track a package",),
        (Slot("id", "code", ("number",)),),
        ("Where is my package {id}?", "Track the package {id}."),
    ),
    Family(
        ("book_taxi", "taxi"),
        ("Book a taxi",),
        (Slot("from", "place", ("origin",)), Slot("to", "place", ("destination",))),
        ("Book a taxi from {from} to {to}.", "I need a taxi from {from} to {to}"),
    ),
    Family(
        ("get_movie_rating", "movie_rating"),
        ("Rating of a movie",),
        (Slot("title", "title", ("movie",)),),
        ("What is the rating of the movie {title}?", "How good is the movie {title}?"),
    ),
    Family(
        ("create_invoice", "invoice"),
        ("Create an invoice",),
        (Slot("name", "person", ("customer",)), Slot("amount", "number", ())),
        ("Create an invoice for {name} of {amount} dollars.", "Invoice {name} for {amount}"),
    ),
    Family(
        ("find_doctor", "doctors"),
        ("Find a doctor",),
        (PLACE,),
        ("Find a doctor in {city}.", "I need a doctor in {city}"),
    ),
)


def _words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(" ".join(part.split()) for part in text.split(","))


CITIES = (
    *CAPITALS.values(),
    *_words(
        """New York, San Francisco, Los Angeles, Chicago, Boston, Seattle, Munich, Hamburg, Barcelona, Milan,
    Manchester, Lyon, Geneva, Krakow, Osaka, Shanghai, Mumbai, Sydney, Toronto, Rio de Janeiro,
    Cape Town, Dubai, Kyoto, Malmö, Köln, São Paulo, St. Louis, Tel Aviv"""
    ),
)
HELD_CITIES = _words(
    """Zurich, Oakland, Naples, Marseille, Porto, Seville, Stuttgart, Leipzig, Dresden, Gdansk, Bergen, Turin,
    Valencia, Liverpool, Glasgow, Antwerp, Rotterdam, Salzburg, Basel, Nagoya, Sapporo, Busan, Chennai, Karachi,
    Lagos, Casablanca, Vancouver, Montreal, Houston, Dallas, Denver, Phoenix, San Diego, Las Vegas, New Orleans,
    Hong Kong, Kuala Lumpur, Zürich, München, Salt Lake City"""
)
PEOPLE = _words("""Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ivy, Jack, Karl, Laura, Max, Nina""")
HELD_PEOPLE = _words("""Jason, Sarah, Oliver, Peter, Ravi, Yuki, Tom, Alice, Bob, Miguel, Chloe, John Smith""")
COMMON = tuple(
    """rice soup bread cheese pasta chess tennis football music history climate politics sport science winter
    summer dinner lunch dentist doctor birthday party homework meeting milk coffee tea apples books shoes cheap
    flights hotel garden guitar piano water house school train station museum good morning thank you hello world
    best old new happy""".split()
)
HELD_COMMON = tuple(
    """lasagna curry pancakes robots elections basketball opera gravity pumpkin yoga groceries laundry passport
    laptop headphones volcano penguins weekend breakfast holiday invoice sunset bicycle repair""".split()
)
LANGUAGES = ("French", "German", "Spanish", "Italian", "Chinese", "Japanese", "English", "Dutch", "Polish", "Turkish")
CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "CNY", "INR", "SEK", "dollars", "euros", "pounds", "yen")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROOMS = ("kitchen", "bathroom", "bedroom", "garage", "office", "hall", "garden", "cellar")
_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl dr fr gr kl pl sh sk st th tr".split()
_RIMES = "a e i o u ai ea ou an ar el en er il in is on or um us ast ent ing ock".split()


def made_up(rng: random.Random) -> str:
    """A word that nobody knows."""
    word = "".join(rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(rng.choice((1, 1, 2, 2, 2, 3))))
    return word if rng.random() < 0.8 and len(word) > 2 else word + rng.choice("aeioknstx")


_LETTERS = "eeeeetttaaaooiiinnsshhrrrddlluuccmmffwwyyppvbbggkjqxz"


def spelt(rng: random.Random, held: bool) -> str:
    """A word that nobody knows; in training often one of any letters, so that all of them are learnt to be copied."""
    if held or rng.random() < 0.5:
        return made_up(rng)
    return "".join(rng.choice(_LETTERS) for _ in range(rng.choice((3, 4, 5, 6, 7, 8, 9, 10))))


def _known(held: bool) -> float:
    """How often a value is a known one. Known words are one token in training: there others matter more."""
    return 0.4 if held else 0.25


def _proper(known: Sequence[str], held_out: Sequence[str]) -> Callable[[random.Random, bool], str]:
    def make(rng: random.Random, held: bool) -> str:
        if rng.random() < _known(held):
            return rng.choice(list(held_out if held else known))
        count = 1 + (rng.random() > (0.85 if held else 0.65)) + (not held and rng.random() < 0.12)
        return " ".join(spelt(rng, held).capitalize() for _ in range(count))

    return make


def _phrase(rng: random.Random, held: bool) -> str:
    """One to three words, of the language or not; in training up to four."""
    count = rng.choice((1, 1, 2, 2, 3) if held else (1, 2, 2, 3, 3, 4))
    return " ".join(
        spelt(rng, held) if rng.random() > 1.5 * _known(held) else rng.choice(HELD_COMMON if held else COMMON)
        for _ in range(count)
    )


def _word(rng: random.Random, held: bool) -> str:
    return rng.choice(HELD_COMMON if held else COMMON) if rng.random() < 1.25 * _known(held) else spelt(rng, held)


def _address(rng: random.Random, held: bool) -> str:
    name = (
        rng.choice(HELD_PEOPLE if held else PEOPLE).split()[0] if rng.random() < 0.5 else spelt(rng, held).capitalize()
    )
    return name if rng.random() < 0.5 else f"{name.lower()}@{made_up(rng)}.{rng.choice(('com', 'org', 'net'))}"


def _day(rng: random.Random, held: bool) -> str:
    if rng.random() < 0.3:
        return f"{rng.randrange(2020, 2031)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"
    return rng.choice(DAYS)


def _code(rng: random.Random, held: bool) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTXYZ") for _ in range(rng.choice((0, 1, 2))))
    return letters + "".join(rng.choice("0123456789") for _ in range(rng.randrange(2, 6)))


def _ticker(rng: random.Random, held: bool) -> str:
    if rng.random() < 0.3:
        return made_up(rng).capitalize()
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randrange(2, 6)))


def _integer(rng: random.Random, held: bool) -> int:
    return rng.randrange(1, rng.choice((10, 30, 100, 100, 1000, 10000)))


def _like(rng: random.Random, number: int) -> int:
    """A number that begins as another does, or has its digits: what is copied must not change over to the other."""
    digits = str(number)
    kept = digits[: rng.randrange(1, len(digits) + 1)]
    return int(rng.choice((kept + str(rng.randrange(100)), kept, "".join(rng.sample(digits, len(digits)))))) or 1


def _number(rng: random.Random, held: bool) -> float | int:
    return round(rng.uniform(0.1, 200), rng.choice((1, 2))) if rng.random() < 0.3 else _integer(rng, held)


KINDS: dict[str, tuple[str, Callable[[random.Random, bool], Value]]] = {  # the JSON type, and how to draw one
    "place": ("string", _proper(CITIES, HELD_CITIES)),
    "person": ("string", _proper(PEOPLE, HELD_PEOPLE)),
    "title": ("string", _proper(PEOPLE, HELD_PEOPLE)),
    "phrase": ("string", _phrase),
    "word": ("string", _word),
    "address": ("string", _address),
    "day": ("string", _day),
    "code": ("string", _code),
    "ticker": ("string", _ticker),
    "language": ("string", lambda rng, held: rng.choice(LANGUAGES)),
    "currency": ("string", lambda rng, held: rng.choice(CURRENCIES)),
    "room": ("string", lambda rng, held: rng.choice(ROOMS)),
    "integer": ("integer", _integer),
    "number": ("number", _number),
}

# Functions that never were: any verb with any noun, so that names are matched by their words.

DO = tuple("get find fetch show check list read create delete start stop open close update count make run".split())
THINGS = tuple(
    """report file price score balance ticket photo note task project invoice account plan table map song team
    match game player level status size color code key door window car bus train route order item product
    message call record server job test build page link video image post comment group event room""".split()
)
HELD_THINGS = tuple("salary forecast ranking contract battery printer voucher backup parcel lecture".split())
NOUN_SLOTS = (
    (Slot("city", "place", ("location", "place")), ("in {city}", "for {city}", "of {city}")),
    (Slot("name", "person", ("user", "person", "owner", "customer")), ("of {name}", "for {name}")),
    (Slot("id", "code", ("number", "key", "code")), ("with id {id}", "number {id}", "{id}")),
    (Slot("count", "integer", ("limit", "number", "n")), ("with {count} entries", "{count} times")),
    (Slot("day", "day", ("date", "when")), ("on {day}", "for {day}")),
    (Slot("language", "language", ("lang",)), ("in {language}",)),
    (Slot("year", "integer", ()), ("in {year}", "of {year}")),
    (Slot("text", "phrase", ("content", "title", "value")), ("with the text {text}", "called {text}")),
)


_WISHES = (
    *(
        "Would you",
        "Would you please",
        "Could you",
        "You should",
        "I would like to",
        "I need you to",
        "Let us",
        "Go and",
    ),
    *("Help me to", "Do", "It is time to", "We have to", "Will you", "Can you please", "I must", "Try to", "Go and"),
)
_WHICH = ("the", "a", "my", "our", "this", "one", "his", "her", "every", "another")
_GIVES = ("Give me", "Tell me", "Hand me", "I am looking for", "Bring", "Let me have", "I would like", "Do you have")


def invented(rng: random.Random, held: bool) -> Family:
    """A function by any verb and noun, with up to three parameters, some of which have names that nobody knows."""
    if not held and rng.random() < 0.4:
        return rng.choice((_deed, _giving, _part, _choosing, _choosing))(rng)
    verb = rng.choice(DO)
    noun = spelt(rng, held) if rng.random() > 1.25 * _known(held) else rng.choice(HELD_THINGS if held else THINGS)
    name = rng.choice((f"{verb}_{noun}", f"{verb}_{noun}", f"{noun}", f"{noun}_{verb}", f"{verb}{noun.capitalize()}"))
    parts, slots = [], []
    for slot, phrases in rng.sample(NOUN_SLOTS, rng.choice((0, 1, 1, 2, 2))):
        slots.append(slot)
        parts.append(rng.choice(phrases))
    if rng.random() < 0.35:  # a parameter that the question names
        key = spelt(rng, held) if rng.random() < 0.6 else rng.choice(THINGS)
        if key != noun and all(key != slot.key for slot in slots):
            kind = rng.choice(("integer", "word", "title", "enum"))
            options = tuple({made_up(rng) for _ in range(rng.choice((2, 3, 4)))}) if kind == "enum" else ()
            slots.append(Slot(key, kind, (), tuple(sorted(options))))
            parts.append(rng.choice((f"with {key} {{{key}}}", f"and {key} {{{key}}}")))
    tail = " ".join(["", *parts])
    asks = (
        f"{verb.capitalize()} the {noun}{tail}.",
        f"Please {verb} the {noun}{tail}",
        f"Can you {verb} the {noun}{tail}?",
        f"I need the {noun}{tail}.",
        f"What is the {noun}{tail}?",
        f"{verb} {noun}{tail}",
        f"How is the {noun}{tail}?",
        f"Where is my {noun}{tail}?",
        f"I want {noun}s{tail}",
        f"{noun.capitalize()}{tail}",
        f"{rng.choice(_WISHES)} {verb} {rng.choice(_WHICH)} {noun}{tail}{rng.choice('.?')}",
        f"{rng.choice(_WISHES)} {verb} {rng.choice(_WHICH)} {noun}{tail}",
        f"{rng.choice(_GIVES)} {rng.choice(_WHICH)} {noun}{tail}.",
        *(f"{_loosely(rng)} {noun}{rng.choice(('', '', 's'))}{tail}{rng.choice(('.', '?', ''))}" for _ in range(5)),
    )
    if not held and rng.random() < 0.2:  # of two words
        second = spelt(rng, held) if rng.random() < 0.5 else rng.choice(THINGS)
        if noun != second:
            return Family(
                (f"{verb}_{noun}_{second}",),
                (f"{verb.capitalize()} the {noun} {second}", f"The {second} of a {noun}", ""),
                tuple(slots),
                tuple(ask.replace(f" {noun}", f" {noun} {second}").replace(f"{second}s", second) for ask in asks[:8]),
            )
    held_asks = (
        f"Could you please {verb} a {noun}{tail}?",
        f"I want you to {verb} the {noun}{tail}.",
        f"Show me the {noun}{tail}",
    )
    about = (f"{verb.capitalize()} the {noun}", f"{verb.capitalize()}s a {noun}", f"The {noun}", "")
    return Family((name,), about, tuple(slots), held_asks if held else asks)


def _deed(rng: random.Random) -> Family:
    """A function whose name is what it does, to one or two things."""
    verb, short = spelt(rng, False), rng.random() < 0.5
    slots = rng.choice(((A, B), (PLACE,), (PERSON,), (PERSON, Slot("amount", "number", ()))))
    first, *rest = (f"{{{slot.key}}}" for slot in slots)
    others = "".join(f" {rng.choice(('and', 'from', 'by', 'with'))} {one}" for one in rest)
    return Family(
        (verb,),
        (f"{verb.capitalize()} {'two numbers' if slots[0] is A else 'something'}", ""),
        slots,
        (f"{verb.capitalize()} {first}{others}.", f"Please {verb} {first}{others}", f"What is {first} {verb}{others}?")
        if short
        else (f"Can you {verb} {first}{others}?", f"I want to {verb} {first}{others}."),
    )


def _noun(rng: random.Random) -> str:
    return spelt(rng, False) if rng.random() < 0.6 else rng.choice(THINGS)


def _giving(rng: random.Random) -> Family:
    """To somebody, something: "Fetch Anna the page cheap tea"."""
    verb, noun = rng.choice(DO) if rng.random() < 0.6 else spelt(rng, False), _noun(rng)
    to = Slot("to", "person", ("recipient", "contact", "name", "user"))
    what = Slot(rng.choice(("text", noun)), rng.choice(("phrase", "word", "title")), ("content", "value"))
    shown = f"{{{what.key}}}"
    asks = (
        f"{verb.capitalize()} {{to}} the {noun} {shown}",
        f"{verb.capitalize()} {{to}} a {noun}: {shown}",
        f"{verb.capitalize()} the {noun} {shown} to {{to}}.",
        f"{verb.capitalize()} a {noun} for {{to}} with {shown}",
    )
    return Family((f"{verb}_{noun}", noun), (f"{verb.capitalize()} a {noun}", ""), (to, what), asks)


def _part(rng: random.Random) -> Family:
    """Something about a thing that has a name: "What is the score of the team Karl?" """
    noun, part = _noun(rng), _noun(rng)
    slot = Slot(
        rng.choice(("title", "name", "text", noun)), rng.choice(("title", "person", "word")), ("label", "which")
    )
    shown = f"{{{slot.key}}}"
    asks = (
        f"What is the {part} of the {noun} {shown}?",
        f"How {rng.choice(('big', 'old', 'long', 'fast', 'loud'))} is the {noun} {shown}?",
        f"{rng.choice(_GIVES)} the {part} of the {noun} {shown}",
        f"Is the {noun} {shown} {rng.choice(('big', 'old', 'long', 'fast', 'loud'))}?",
    )
    return Family((f"get_{noun}_{part}", f"{noun}_{part}"), (f"The {part} of a {noun}", ""), (slot,), asks)


_LOOSE = tuple(
    """I you we he she they it want need have like would could should must can will do does did is are was there
    any some a an the my your our this that more another good new next last please now today here just only also
    looking for after to in at with about see know get find show hear use try think say help me us him her""".split()
)


def _loosely(rng: random.Random) -> str:
    """What stands before a function's word, in no order that means anything: the word tells the function, not the
    phrase around it."""
    words = [rng.choice(_LOOSE) if rng.random() < 0.9 else spelt(rng, False) for _ in range(rng.randrange(1, 6))]
    return " ".join(words).capitalize()


_OPTIONS = (
    ("red", "green", "blue"),
    ("left", "right"),
    ("fast", "slow"),
    ("old", "new", "best"),
    ("hot", "cold", "warm"),
    ("small", "large"),
    ("tiny", "small", "large", "huge"),
    ("short", "medium", "long"),
)


def _choosing(rng: random.Random) -> Family:
    """So many of a kind: "Stop 3 fast trains"."""
    verb, noun = rng.choice(DO) if rng.random() < 0.6 else spelt(rng, False), _noun(rng)
    made = tuple(sorted({spelt(rng, False) for _ in range(rng.choice((2, 3, 4)))}))
    kind = Slot(rng.choice(("kind", "colour", "type", "mode")), "enum", (), rng.choice((made, *_OPTIONS)))
    count = Slot("count", "integer", ("number", "n", "amount"))
    shown = f"{{count}} {{{kind.key}}} {noun}"
    asks = (
        f"{verb.capitalize()} {shown}.",
        f"I want {shown}s",
        f"{rng.choice(_WISHES)} {verb} {shown}s",
        f"{shown}, please",
    )
    slots = (kind, count) if rng.random() < 0.6 else (count, kind)
    return Family((f"{verb}_{noun}", noun), (f"{verb.capitalize()} a {noun}", ""), slots, asks)


@dataclass(frozen=True, slots=True)
class Function:
    """What a request tells of a function; `slots` by the names that its parameters have here."""

    name: str
    about: str
    slots: dict[str, Slot]
    required: tuple[str, ...]

    @property
    def tool(self) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        for name, slot in self.slots.items():
            kind = KINDS[slot.kind][0] if slot.kind != "enum" else "string"
            properties[name] = {"type": kind, **({"enum": list(slot.options)} if slot.options else {})}
        parameters = {"type": "object", "properties": properties, "required": list(self.required)}
        described = {"description": self.about} if self.about else {}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}

    @property
    def head(self) -> str:
        """What a line begins with: the words that say what the function is for."""
        return f"{self.name}{' ' * bool(self.about)}{self.about}="

    @property
    def line(self) -> str:
        """As the chat template shows it: the name stands there twice, to be read and then to be copied."""
        shown = [
            f"{name}{'' if name in self.required else '?'}:{'|'.join(slot.options) or KINDS[slot.kind][0]}"
            for name, slot in self.slots.items()
        ]
        return f"{self.head}{self.name}({','.join(shown)})\n"


def block(functions: Sequence[Function]) -> str:
    """What the chat template puts behind a question."""
    return "\n<tools>\n" + "".join(function.line for function in functions) + "</tools>" if functions else ""


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of an answer that stands in the question (or the tools behind it) too."""

    start: int
    end: int
    source: int  # in the question with the tools; of the turn before if `back` is 1
    back: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that one of the functions answers."""

    question: str
    functions: tuple[Function, ...]
    function: Function
    arguments: dict[str, Value]
    answer: str  # the call, as the model writes it
    copies: tuple[Copy, ...]
    spans: dict[str, tuple[int, int]]  # of the values in the question


_CAMEL = re.compile("(?<=[a-z])(?=[A-Z])")
_COMMON_WORDS = set(
    "what please could want need show tell with from about many much number this that have where".split()
)
_MARK = re.compile(r"\{(\w+)\}")


def asked(rng: random.Random, held: bool, vary: Callable[[str], str]) -> Asked:
    """A question for one of one to five functions. `vary`: as people type, without changing where things are."""
    draw = rng.random()
    family = (
        invented(rng, held)
        if draw < (0.4 if held else 0.6)
        else rng.choice(HELD_FAMILIES if held and draw < 0.7 else FAMILIES)
    )
    ask = rng.choice(family.held if held and family.held else family.asks)
    ask = ask if held else _dressed(rng, _wished(rng, family, ask))
    function = _function(rng, family, ask)
    others = _others(rng, held, family, function.name)
    functions = [function, *others]
    rng.shuffle(functions)
    question, values, spans = _filled(rng, held, ask, function)
    question = vary(question)
    answer, copies = called(function, values, spans, question, functions)
    arguments = {name: value for name, (value, _) in values.items()}
    return Asked(question, tuple(functions), function, arguments, answer, copies, spans)


_BEFORE = tuple("Hi! ,Hello: ,Now: ,Quick: ,One more: ,Would you help me? ,My next question: ,OK: ,So: ".split(","))
_AFTER = tuple(" Thanks., Thank you!, Be quick., That is all., Do it now., That would help me.".split(","))


_VERBS = frozenset(
    """add book calculate convert create define email exchange find get give look make multiply play plan put remind
    reserve roll say schedule search send set show start switch tell throw track translate turn write""".split()
)
_ASKING = (*_WISHES, "Please", "Please", "Can you", "Can you", "Could you", "Could you please", "I want you to")


def _wished(rng: random.Random, family: Family, ask: str) -> str:
    """Some of what is asked for with a verb, as a wish: "Play it" as "Can you play it?", but never as a phrase that is
    held out."""
    if rng.random() > 0.35 or ask.split(maxsplit=1)[0].lower() not in _VERBS:
        return ask
    wish = rng.choice(_ASKING)
    wished = f"{wish} {ask[0].lower()}{ask[1:].rstrip('.')}{rng.choice('.?') if ask[-1] == '.' else ''}"
    return ask if wished.lower().rstrip(".?") in {one.lower().rstrip(".?") for one in family.held} else wished


def _dressed(rng: random.Random, ask: str) -> str:
    """With words about it that mean nothing: what tells the function are the words that it shares with the question."""
    before = rng.choice(_BEFORE) if rng.random() < 0.15 else ""
    after = rng.choice(_AFTER) if rng.random() < 0.15 and ask[-1] in ".?" else ""
    return f"{before}{ask}{after}"


def _function(rng: random.Random, family: Family, ask: str) -> Function:
    """The family's function with some names; a parameter that the phrase cannot say is left out, or not required."""
    slots: dict[str, Slot] = {}
    required = []
    bare = re.sub(r"\[[^\]]*\]", "", ask)
    for slot in family.slots:
        said, always = f"{{{slot.key}}}" in ask, f"{{{slot.key}}}" in bare
        if not always and rng.random() < 0.4:
            continue
        name = slot.name(rng) if rng.random() < 0.6 else slot.key
        name = next(free for free in (name, slot.key, f"{slot.key}_2") if free not in slots)
        slots[name] = slot
        if always or (said and rng.random() < 0.3):
            required.append(name)
    about = rng.choice(("", rng.choice(family.about)))
    return Function(rng.choice(family.names), about, slots, tuple(required))


def _others(rng: random.Random, held: bool, family: Family, name: str) -> list[Function]:
    """Functions for other things."""
    out: dict[str, Function] = {}
    taken = {family.names, (name,)}
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3) if held else (0, 0, 1, 1, 2, 3))):
        other = invented(rng, held) if rng.random() < 0.5 else rng.choice(FAMILIES)
        if other.names in taken or set(other.names) & set(family.names):
            continue
        if other not in FAMILIES and _nouns(other) & _nouns(family):
            continue  # nobody could choose between finding and reading the same thing
        taken.add(other.names)
        function = _function(rng, other, rng.choice(other.asks))
        if function.name != name:
            out[function.name] = function
    return list(out.values())


def _nouns(family: Family) -> set[str]:
    """The words of names and phrases that are not what invented functions do."""
    phrases = re.sub(r"\{\w+\}", " ", " ".join((*family.names, *family.asks, *family.held)))
    words = re.findall("[^\\W_]+", _CAMEL.sub(" ", phrases).lower())
    return {word for word in words if len(word) > 3} - set(DO) - _COMMON_WORDS


def _filled(
    rng: random.Random, held: bool, ask: str, function: Function
) -> tuple[str, dict[str, tuple[Value, str]], dict[str, tuple[int, int]]]:
    """The question, the values by the parameters' names (each with its text) and where these are in the question."""
    names = {slot.key: name for name, slot in function.slots.items()}

    def kept(match: re.Match[str]) -> str:
        keys = _MARK.findall(match[1])
        wanted = all(key in names for key in keys)
        needed = any(names.get(key) in function.required for key in keys)
        return match[1] if wanted and (needed or rng.random() < 0.6) else ""

    ask = re.sub(r"\[([^\]]*)\]", kept, ask)
    question, at = "", 0
    values: dict[str, tuple[Value, str]] = {}
    spans: dict[str, tuple[int, int]] = {}
    for match in _MARK.finditer(ask):
        question += ask[at : match.start()]
        at = match.end()
        slot = function.slots[names[match[1]]]
        value, text = _value(rng, held, slot, {str(given) for given, _ in values.values()})
        quoted = slot.kind in ("phrase", "title") and rng.random() < (0.6 if " " in text else 0.3)
        mark = rng.choice("\"'") if quoted else ""
        start = len(question) + len(mark)
        spans[names[match[1]]] = (start, start + len(text))
        values[names[match[1]]] = (value, text)
        question += f"{mark}{text}{mark}"
    question += ask[at:]
    order = [name for name in function.slots if name in values]
    return question, {name: values[name] for name in order}, spans


def _value(rng: random.Random, held: bool, slot: Slot, taken: set[str]) -> tuple[Value, str]:
    """Another one than those taken, with how it is said."""
    while True:
        value = rng.choice(slot.options) if slot.kind == "enum" else KINDS[slot.kind][1](rng, held)
        before = [int(one) for one in taken if one.isdigit()]
        if before and isinstance(value, int) and not held and rng.random() < 0.4:
            value = _like(rng, rng.choice(before))
        if str(value) not in taken:
            break
    if isinstance(value, int) and value < len(NUMBERS) and rng.random() < 0.15:
        return value, NUMBERS[value]
    return value, str(value)


def called(
    function: Function,
    values: dict[str, tuple[Value, str]],
    spans: dict[str, tuple[int, int]],
    question: str,
    functions: Sequence[Function],
) -> tuple[str, tuple[Copy, ...]]:
    """The call as the model writes it, and what of it stands where in the question with the tools behind it."""
    copies = []
    context = question + block(functions)
    line = context.index("\n" + function.line, len(question)) + 1 + len(function.head)
    answer = '<tool_call>\n{"name": "'
    copies.append(Copy(len(answer), len(answer) + len(function.name), line))
    answer += f'{function.name}", "arguments": {{'
    at = line + len(function.name) + 1
    shown = {}
    for part in function.line[len(function.head) + len(function.name) + 1 :].split(")")[0].split(","):
        shown[part.split(":")[0].rstrip("?")] = at
        at += len(part) + 1
    for number, (name, (value, text)) in enumerate(values.items()):
        answer += ', "' if number else '"'
        copies.append(Copy(len(answer), len(answer) + len(name), shown[name]))
        answer += f'{name}": '
        mark = '"' if isinstance(value, str) else ""
        answer += mark
        start = spans[name][0]
        length = len(text) if str(value) == text else 0
        copies.append(Copy(len(answer), len(answer) + length, start))
        answer += f"{value}{mark}"
    return answer + "}}\n</tool_call>", tuple(copies)
