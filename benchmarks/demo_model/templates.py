"""How people ask for posters: templates of prompts and edits, English and Chinese, and the English words in them.

A template has the slots {background}, {shapes} and {words}. No template holds an apostrophe or a quotation mark of its
own: what stands in quotes is what the picture shall show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Pick = Callable[[Sequence[Any]], Any]

_WORDS = """
AGENCY ALBUM AMBER ANCHOR APPLE ARCADE ARENA ART ATLAS AUTUMN BAKERY BALLET BAND BANK BAR BASS BEACH BEAT BEST
BIKE BIRD BLOOM BLUE BOAT BOLD BOOK BOX BREAD BRIDGE BRIGHT BUS CAFE CAKE CALM CAMP CANDLE CARNIVAL CASTLE CAT
CHESS CHOIR CINEMA CIRCUS CITY CLOSED CLOUD CLUB COAST COCOA COFFEE COMET CONCERT COOK CORAL DANCE DAWN DAY DEAL
DESERT DESIGN DISCO DO DOG DOWN DRAW DREAM DRIVE DUCK EARTH EAST ECHO EXIT EXPO FAIR FALL FARM FAST FESTIVAL
FILM FIRE FISH FLAT FLOWER FLY FOREST FOX FREE FRESH FRIDAY FROST FRUIT FUN FUTURE GALAXY GALLERY GAME GARDEN
GIFT GLASS GO GOLD GOOD GRAND GREEN GUITAR HALL HAPPY HARBOR HELLO HERO HI HOME HONEY HOPE HORIZON HOTEL HOUR
ICE IDEA INK ISLAND JAM JAZZ JOURNEY JOY JUICE JULY JUMP JUNE JUNGLE KEY KIDS KIND KITE LAKE LAMP LATE LEMON
LIBRARY LIFE LIGHT LIVE LOVE LUNCH MAGIC MANGO MAP MARCH MARKET MAY ME MEADOW MEET MELON MENU METRO MILK MINT
MODERN MONDAY MOON MORE MOTION MOVIE MUSEUM MUSIC NEON NEST NEW NEWS NEXT NIGHT NO NOON NORTH NOVA NOW OASIS
OCEAN OFF OK OLIVE ON OPEN OPERA ORBIT ORCHID OWL PAINT PANDA PAPER PARK PARTY PATH PEACE PEAR PHOTO PIANO
PICNIC PIZZA PLANET PLAY PLUM POEM POP POST PULSE PUZZLE QUEST QUICK QUIET QUIZ RADIO RAIN RANCH RAVEN READ RED
RELAX RHYTHM RICE RIDE RIVER ROBOT ROCK ROSE RUN RUSH SAIL SALE SALT SAND SATURDAY SCHOOL SEA SHOP SHOW SILVER
SING SKY SLOW SMILE SNOW SOCCER SODA SONG SOUL SOUND SOUP SOUTH SPACE SPARK SPEED SPICE SPORT SPRING STAGE STAR
START STATION STOP STORM STORY STUDIO SUGAR SUMMER SUN SUNDAY SUPER SURF SWEET SWIM TANGO TAXI TEA TENNIS THANKS
THEATER TIGER TIME TO TODAY TOWN TOY TRAIN TRAVEL TREE TULIP TUNNEL UNITY UP URBAN VALLEY VELVET VIEW VILLAGE
VINYL VIOLET VOICE VOTE VOYAGE WALK WALTZ WATER WAVE WE WELCOME WEST WILD WIND WINTER WONDER WORK WORLD YES YOGA
YOU ZEBRA ZEN ZERO ZONE ZOO
2026 24H 3D 4YOU 50OFF 7PM 90S B2B GO2 MP3 NO1 TOP10 V8 VOL2 X100
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Language:
    """The words of one language. Every name has its ways of saying it; lists of templates are drawn from evenly."""

    quotes: tuple[tuple[str, str], ...]
    colours: dict[str, str]
    kinds: dict[str, tuple[str, ...]]
    shape_places: dict[str, tuple[str, ...]]
    word_places: dict[str, tuple[str, ...]]
    backgrounds: dict[str, tuple[str, ...]]
    shape: tuple[str, ...]
    placed_word: str
    above: tuple[str, ...]
    joints: tuple[str, str]
    templates: tuple[str, ...]
    placeless: tuple[str, ...]
    colour_edits: tuple[str, ...]
    shape_edits: tuple[str, ...]
    background_edits: tuple[str, ...]
    word_edits: tuple[str, ...]
    only_word: str
    which_words: tuple[tuple[str, ...], tuple[str, ...]]

    def prompt(
        self,
        pick: Pick,
        background: tuple[str, Sequence[str]],
        shapes: Sequence[tuple[str, str, str]],
        words: Sequence[tuple[str, str]],
        usual_places: bool,
    ) -> str:
        """A prompt that asks for all of it. `words` come quoted; `usual_places` allows to leave their places out."""
        placeless = usual_places and pick((True, False))
        template = pick(self.placeless if placeless else self.templates)
        layout, colours = background
        names = [self.colours[name] for name in colours]
        ground = _with_article(pick(self.backgrounds[layout]).format(*names))
        if placeless:
            texts = pick(self.above).format(*(word for word, _ in words)) if len(words) > 1 else words[0][0]
        else:
            placed = [self.placed_word.format(word=word, place=pick(self.word_places[place])) for word, place in words]
            texts = _joined(placed, self.joints)
        listed = _joined([self._shape(pick, *shape) for shape in shapes], self.joints)
        sentence = template.format(background=ground, shapes=listed, words=texts)
        return sentence[0].upper() + sentence[1:]

    def _shape(self, pick: Pick, kind: str, colour: str, place: str) -> str:
        phrase = pick(self.shape).format(
            colour=self.colours[colour], kind=pick(self.kinds[kind]), place=pick(self.shape_places[place])
        )
        return _with_article(phrase)

    def edit_colour(self, pick: Pick, kind: str, colour: str) -> str:
        """Asks for another colour of the one shape of this kind."""
        return pick(self.colour_edits).format(kind=pick(self.kinds[kind]), colour=self.colours[colour])

    def edit_shape(self, pick: Pick, old: str, new: str) -> str:
        """Asks for another shape in place of the one of this kind."""
        return _with_article(pick(self.shape_edits).format(old=pick(self.kinds[old]), new=pick(self.kinds[new])))

    def edit_background(self, pick: Pick, colour: str) -> str:
        """Asks for a plain background."""
        return pick(self.background_edits).format(colour=self.colours[colour])

    def edit_word(self, pick: Pick, which: int | None, quoted: str) -> str:
        """Asks for another word in place of the only one, or of the upper (0) or lower (1) of two.

        The old word is not named: the glyph encoder would be told to write it.
        """
        name = self.only_word if which is None else pick(self.which_words[which])
        return pick(self.word_edits).format(which=name, word=quoted)


def _joined(parts: Sequence[str], joints: tuple[str, str]) -> str:
    """`a`, `a and b`, `a, b and c`: between all but the last two stands the first joint."""
    if len(parts) == 1:
        return parts[0]
    return joints[0].join(parts[:-1]) + joints[1] + parts[-1]


def _with_article(phrase: str) -> str:
    """`a X` as `an X` where X begins with a vowel; there is nothing to do in Chinese."""
    words = phrase.split(" ")
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][0] in "aeio":
            words[i] = "an"
    return " ".join(words)


ENGLISH = Language(
    quotes=(("'", "'"), ("'", "'"), ('"', '"'), ("\u201c", "\u201d")),
    colours={
        name: name
        for name in (
            *("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black"),
            *("cream", "sky blue", "mint", "navy", "dark green", "maroon", "teal"),
        )
    },
    kinds={name: (name,) for name in ("circle", "square", "triangle", "star", "ring", "diamond", "cross", "heart")},
    shape_places={
        "top left": ("at the top left", "in the top left corner"),
        "top": ("at the top", "at the top center"),
        "top right": ("at the top right", "in the top right corner"),
        "left": ("on the left", "at the left"),
        "center": ("in the center", "in the middle"),
        "right": ("on the right", "at the right"),
        "bottom left": ("at the bottom left", "in the bottom left corner"),
        "bottom": ("at the bottom", "at the bottom center"),
        "bottom right": ("at the bottom right", "in the bottom right corner"),
    },
    word_places={
        "top": ("at the top",),
        "middle": ("in the middle", "across the middle"),
        "bottom": ("at the bottom",),
    },
    backgrounds={
        "plain": ("a {0} background", "a plain {0} background"),
        "stacked": (
            "a two-tone background, {0} above and {1} below",
            "a background with {0} on top and {1} below",
            "a background that is {0} in the upper half and {1} in the lower half",
        ),
        "side by side": (
            "a two-tone background, {0} on the left and {1} on the right",
            "a background with {0} to the left and {1} to the right",
            "a background that is {0} in the left half and {1} in the right half",
        ),
    },
    shape=("a {colour} {kind} {place}",),
    placed_word="{word} {place}",
    above=("{0} above {1}", "{0} and {1}"),
    joints=(", ", " and "),
    templates=(
        "a poster with {background}, {shapes}, and the text {words}",
        "a poster on {background}: {shapes}; it says {words}",
        "{background} with {shapes} and bold lettering: {words}",
        "poster, {background}, {shapes}, {words}",
        "draw {shapes} on {background}, and write {words}",
        "please design a poster that reads {words}, with {shapes} on {background}",
        "a minimal poster reading {words}, {background}, {shapes}",
        "a flat design poster. {background}. It shows {shapes}. It reads {words}.",
        "make a poster with {shapes}. The text is {words}. Use {background}.",
        "I need a poster that says {words}. Put {shapes} on {background}.",
        "{shapes} on {background}, lettered {words}",
        "write {words} in large letters on {background}, with {shapes}",
        "an event poster: {words}, together with {shapes}, on {background}",
        "geometric poster showing {shapes} on {background}, with {words} in capitals",
        "a simple sign on {background} which says {words}, decorated with {shapes}",
        "print {words} on {background} and add {shapes}",
        "can you make me a poster with {background} that has {shapes} and says {words}?",
        "a clean modern poster, {background}, bold text {words}, and {shapes}",
        "create a poster. Text: {words}. Shapes: {shapes}. Background: {background}.",
        "a cover with {shapes}, the title {words} and {background}",
    ),
    placeless=(
        "a poster that says {words}, with {shapes} on {background}",
        "a poster with the text {words}, {background} and {shapes}",
        "{words} on {background} with {shapes}",
        "poster reading {words}, {shapes}, {background}",
        "design a poster for {words} with {shapes} and {background}",
        "write {words} on {background} and draw {shapes}",
        "{shapes} and the text {words} on {background}",
        "a bold poster, {words}, on {background} with {shapes}",
        "please draw {background} with {shapes}, titled {words}",
        "a flyer for {words} that has {background} and {shapes}",
    ),
    colour_edits=(
        "make the {kind} {colour}",
        "turn the {kind} {colour}",
        "paint the {kind} {colour}",
        "change the {kind} to {colour}",
        "change the color of the {kind} to {colour}",
        "the {kind} should be {colour}",
        "please make the {kind} {colour} and keep the rest",
    ),
    shape_edits=(
        "replace the {old} with a {new}",
        "turn the {old} into a {new}",
        "change the {old} to a {new}",
        "put a {new} where the {old} is",
        "make the {old} a {new} of the same color",
    ),
    background_edits=(
        "make the background {colour}",
        "change the background to {colour}",
        "paint the whole background {colour}",
        "use a plain {colour} background instead",
        "the background should be {colour}",
    ),
    word_edits=(
        "change {which} to {word}",
        "replace {which} with {word}",
        "{which} should be {word}",
        "let {which} read {word}",
        "make {which} {word}",
    ),
    only_word="the word",
    which_words=(
        ("the upper word", "the top word", "the first word"),
        ("the lower word", "the bottom word", "the second word"),
    ),
)

CHINESE = Language(
    quotes=(("「", "」"), ("\u201c", "\u201d"), ('"', '"')),
    colours={
        "red": "红色",
        "orange": "橙色",
        "yellow": "黄色",
        "green": "绿色",
        "blue": "蓝色",
        "purple": "紫色",
        "pink": "粉色",
        "white": "白色",
        "black": "黑色",
        "cream": "米色",
        "sky blue": "天蓝色",
        "mint": "薄荷绿",
        "navy": "藏青色",
        "dark green": "深绿色",
        "maroon": "酒红色",
        "teal": "青色",
    },
    kinds={
        "circle": ("圆形",),
        "square": ("正方形",),
        "triangle": ("三角形",),
        "star": ("星形",),
        "ring": ("圆环",),
        "diamond": ("菱形",),
        "cross": ("十字形",),
        "heart": ("心形",),
    },
    shape_places={
        "top left": ("左上角",),
        "top": ("上方",),
        "top right": ("右上角",),
        "left": ("左侧",),
        "center": ("中央",),
        "right": ("右侧",),
        "bottom left": ("左下角",),
        "bottom": ("下方",),
        "bottom right": ("右下角",),
    },
    word_places={"top": ("上方",), "middle": ("中间",), "bottom": ("下方",)},
    backgrounds={
        "plain": ("{0}背景", "纯{0}背景"),
        "stacked": ("上半{0}、下半{1}的背景",),
        "side by side": ("左半{0}、右半{1}的背景",),
    },
    shape=("{place}有一个{colour}的{kind}", "{place}一个{colour}{kind}"),
    placed_word="{place}写着{word}",
    above=("{0}和{1}",),
    joints=("，", "，"),
    templates=(
        "一张海报，{background}，{shapes}，{words}",
        "请画一张海报：{background}，{words}，{shapes}。",
        "设计一张{background}的海报，{shapes}，{words}。",
        "{background}，{shapes}，{words}，简洁的海报",
    ),
    placeless=(
        "一张写着{words}的海报，{background}，{shapes}",
        "请设计海报，文字是{words}，{background}，{shapes}。",
    ),
    colour_edits=("把{kind}变成{colour}", "将{kind}改为{colour}", "{kind}换成{colour}"),
    shape_edits=("把{old}换成{new}", "将{old}改为{new}"),
    background_edits=("把背景换成{colour}", "将背景改为{colour}"),
    word_edits=("把{which}改成{word}", "将{which}换成{word}"),
    only_word="文字",
    which_words=(("上面的文字", "第一个词"), ("下面的文字", "第二个词")),
)
