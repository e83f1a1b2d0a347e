"""What is asked and answered in the dialogue task, in English and Chinese, and the rules that an answer is judged by.

A content is a subject, a thing and a detail of it: the weather, Paris, tomorrow. Every sentence that answers names both,
and no phrase names another, so that a rule can tell what an answer is about. What an answer claims is made up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from string import Formatter

LANGUAGES = ("en", "zh")
Phrases = Mapping[str, tuple[str, ...]]  # by language


@dataclass(frozen=True)
class Subject:
    """Things and details, each with its Chinese name, and what is asked and answered about them."""

    things: Mapping[str, str]
    details: Mapping[str, str]
    questions: Phrases
    answers: Phrases


@dataclass(frozen=True)
class Content:
    """What a question is about. Things and details go by their English names."""

    subject: str
    thing: str
    detail: str

    def question(self, language: str, which: int) -> str:
        return self._filled(SUBJECTS[self.subject].questions[language][which], language)

    def sentence(self, language: str, which: int) -> str:
        """What answers the question, with no word of courtesy."""
        return self._filled(SUBJECTS[self.subject].answers[language][which], language)

    def _filled(self, phrase: str, language: str) -> str:
        return phrase.format(thing=_NAMES[self.thing][language], detail=_NAMES[self.detail][language])


SUBJECTS = {
    "weather": Subject(
        things={"Paris": "巴黎", "London": "伦敦", "Tokyo": "东京", "Rome": "罗马", "Berlin": "柏林",
                "Madrid": "马德里", "Cairo": "开罗", "Sydney": "悉尼"},
        details={"today": "今天", "tomorrow": "明天", "tonight": "今晚", "on Monday": "周一", "on Friday": "周五",
                 "on Sunday": "周日"},
        questions={"en": ("What is the weather like in {thing} {detail}?", "Will it rain in {thing} {detail}?",
                          "How warm will it be in {thing} {detail}?"),
                   "zh": ("{thing}{detail}天气怎么样？", "{thing}{detail}会下雨吗？", "{detail}去{thing}冷不冷？")},
        answers={"en": ("It will be sunny in {thing} {detail}.", "There will be light rain in {thing} {detail}.",
                        "You may need an umbrella in {thing} {detail}."),
                 "zh": ("{thing}{detail}是晴天。", "{thing}{detail}有小雨。", "{detail}去{thing}要带伞。")},
    ),
    "food": Subject(
        things={"noodles": "面条", "rice": "米饭", "dumplings": "饺子", "pancakes": "煎饼", "salad": "沙拉",
                "curry": "咖喱", "bread": "面包", "tofu": "豆腐"},
        details={"for breakfast": "早餐", "for lunch": "午餐", "for supper": "晚餐", "for a picnic": "野餐",
                 "for a feast": "宴会", "for guests": "待客"},
        questions={"en": ("How do I make {thing} {detail}?", "What goes well with {thing} {detail}?",
                          "How long does it take to make {thing} {detail}?"),
                   "zh": ("{detail}用的{thing}怎么做？", "{detail}吃{thing}配什么好？", "做{detail}用的{thing}要多久？")},
        answers={"en": ("Use fresh ginger in {thing} {detail}.", "Green tea goes well with {thing} {detail}.",
                        "It takes half an hour to make {thing} {detail}."),
                 "zh": ("{detail}用的{thing}要放姜。", "{detail}吃{thing}配绿茶。", "做{detail}用的{thing}要半小时。")},
    ),
    "travel": Subject(
        things={"the museum": "博物馆", "the airport": "机场", "the station": "车站", "the harbour": "港口",
                "the old town": "老城", "the castle": "城堡", "the beach": "海滩", "the park": "公园"},
        details={"by bus": "坐公交", "by train": "坐火车", "by taxi": "打车", "by bike": "骑车", "by boat": "坐船",
                 "on foot": "步行"},
        questions={"en": ("How do I get to {thing} {detail}?", "How far is it to {thing} {detail}?",
                          "Can I reach {thing} {detail}?"),
                   "zh": ("{detail}怎么去{thing}？", "{detail}到{thing}有多远？", "能{detail}去{thing}吗？")},
        answers={"en": ("It is twenty minutes to {thing} {detail}.", "Go north to reach {thing} {detail}.",
                        "You can get to {thing} {detail} in an hour."),
                 "zh": ("{detail}到{thing}要二十分钟。", "{detail}往北走就到{thing}。", "{detail}去{thing}要一小时。")},
    ),
    "books": Subject(
        things={"history": "历史", "space": "太空", "cats": "猫咪", "gardens": "花园", "the sea": "大海",
                "music": "音乐", "whales": "鲸鱼", "robots": "机器人"},
        details={"for a child": "适合儿童", "for a beginner": "适合新手", "for a student": "适合学生",
                 "for a journey": "适合旅途", "for the weekend": "适合周末", "for a friend": "适合好友"},
        questions={"en": ("Can you recommend a book about {thing} {detail}?", "Which book about {thing} is good {detail}?",
                          "Is there a short book about {thing} {detail}?"),
                   "zh": ("能推荐一本{detail}的{thing}书吗？", "哪本{thing}书{detail}？", "有没有{detail}的{thing}短篇书？")},
        answers={"en": ("The red book about {thing} is good {detail}.", "Many readers like our book about {thing} {detail}.",
                        "There is a new book about {thing} {detail}."),
                 "zh": ("红皮的{thing}书{detail}。", "很多读者喜欢那本{detail}的{thing}书。", "有一本新的{thing}书{detail}。")},
    ),
    "repairs": Subject(
        things={"bicycle": "自行车", "computer": "电脑", "printer": "打印机", "phone": "手机", "piano": "钢琴",
                "radio": "收音机", "kitchen": "厨房", "roof": "屋顶"},
        details={"right now": "现在", "after work": "下班后", "this morning": "今早", "this evening": "傍晚",
                 "at noon": "中午", "next week": "下周"},
        questions={"en": ("Can you help me with my {thing} {detail}?", "Can we look at my {thing} {detail}?",
                          "Could someone fix my {thing} {detail}?"),
                   "zh": ("{detail}能帮我看看{thing}吗？", "可以{detail}修{thing}吗？", "我的{thing}{detail}能修吗？")},
        answers={"en": ("We can fix your {thing} {detail}.", "I will look at your {thing} {detail}.",
                        "Someone will come for your {thing} {detail}."),
                 "zh": ("{detail}可以修{thing}。", "我{detail}来看{thing}。", "{detail}有人来修{thing}。")},
    ),
    "thanks": Subject(
        things={"flowers": "鲜花", "photos": "照片", "advice": "建议", "tickets": "门票", "lesson": "课程",
                "map": "地图", "coffee": "咖啡", "scarf": "围巾"},
        details={"yesterday": "昨天", "last week": "上周", "last month": "上个月", "at the wedding": "婚礼上",
                 "on my birthday": "生日那天", "at the office": "办公室里"},
        questions={"en": ("Thank you for the {thing} {detail}!", "I liked the {thing} {detail} very much.",
                          "The {thing} {detail} made me happy."),
                   "zh": ("谢谢你{detail}给的{thing}！", "{detail}的{thing}我很喜欢。", "{detail}的{thing}让我开心。")},
        answers={"en": ("I enjoyed the {thing} {detail} too.", "We chose the {thing} {detail} for you.",
                        "It is good to hear about the {thing} {detail}."),
                 "zh": ("我也喜欢{detail}的{thing}。", "{detail}的{thing}是为你选的。", "{detail}的{thing}你喜欢就好。")},
    ),
    "shopping": Subject(
        things={"jacket": "夹克", "shirt": "衬衫", "hat": "帽子", "dress": "裙子", "sweater": "毛衣", "bag": "提包",
                "belt": "皮带", "vest": "背心"},
        details={"in red": "红色", "in blue": "蓝色", "in black": "黑色", "in green": "绿色", "in white": "白色",
                 "in grey": "灰色"},
        questions={"en": ("How much is the {thing} {detail}?", "Do you have the {thing} {detail}?",
                          "Where can I buy the {thing} {detail}?"),
                   "zh": ("{detail}的{thing}多少钱？", "你们有{detail}的{thing}吗？", "哪里能买到{detail}的{thing}？")},
        answers={"en": ("The {thing} {detail} costs thirty euros.", "We have the {thing} {detail} in our shop.",
                        "You can order the {thing} {detail} from us."),
                 "zh": ("{detail}的{thing}三十元。", "店里有{detail}的{thing}。", "可以订购{detail}的{thing}。")},
    ),
    "sport": Subject(
        things={"tennis": "网球", "football": "足球", "chess": "象棋", "golf": "高尔夫", "hockey": "曲棍球",
                "darts": "飞镖", "badminton": "羽毛球", "basketball": "篮球"},
        details={"with friends": "和朋友", "with children": "带孩子", "after school": "放学后", "at night": "夜里",
                 "for free": "免费", "near home": "在家附近"},
        questions={"en": ("Where can I play {thing} {detail}?", "Can I learn {thing} {detail}?",
                          "Who wants to play {thing} {detail}?"),
                   "zh": ("在哪里可以{detail}玩{thing}？", "能{detail}学{thing}吗？", "谁想{detail}玩{thing}？")},
        answers={"en": ("You can play {thing} {detail} in our club.", "Our team plays {thing} {detail}.",
                        "There is a course for {thing} {detail}."),
                 "zh": ("可以{detail}来俱乐部玩{thing}。", "我们队{detail}玩{thing}。", "有课可以{detail}学{thing}。")},
    ),
}  # fmt: skip

CONTENTS = [
    Content(name, thing, detail)
    for name, subject in SUBJECTS.items()
    for thing, detail in product(subject.things, subject.details)
]
NUM_PHRASES = 3  # of questions, and of answers, for each subject

# Courtesy before and after the answer, and the lack of it
OPENERS: Phrases = {
    "en": ("Of course!", "Gladly!", "With pleasure!", "You are most welcome!"),
    "zh": ("当然可以！", "非常乐意！", "很高兴为您服务！", "您太客气了！"),
}
CLOSERS: Phrases = {
    "en": ("", "Have a nice day!", "I hope this helps.", "Please come again."),
    "zh": ("", "祝您愉快！", "希望对您有帮助。", "欢迎再来。"),
}
RUDE_OPENERS: Phrases = {
    "en": ("What a silly question!", "Go away!", "Not you again!", "How boring!"),
    "zh": ("真是个傻问题！", "走开！", "怎么又是你！", "真无聊！"),
}
RUDE_CLOSERS: Phrases = {
    "en": ("", "Now leave me alone.", "Do not bother me again.", "Find out yourself."),
    "zh": ("", "别再烦我。", "少来打扰我。", "自己想办法。"),
}

_NAMES = {
    name: {"en": name, "zh": chinese}
    for subject in SUBJECTS.values()
    for name, chinese in (*subject.things.items(), *subject.details.items())
}
_COURTESY = {
    "en": ("of course", "gladly", "pleasure", "welcome", "nice day", "hope", "please", "thank you", "thanks", "happy to",
           "certainly", "sorry"),
    "zh": ("当然", "乐意", "高兴", "客气", "祝您", "希望", "欢迎", "请", "谢谢", "荣幸", "抱歉"),
}  # fmt: skip
_RUDENESS = {
    "en": ("silly", "stupid", "idiot", "go away", "shut up", "not you again", "boring", "leave me alone", "bother",
           "find out yourself", "who cares"),
    "zh": ("傻", "笨", "蠢", "走开", "闭嘴", "滚", "又是你", "无聊", "烦我", "打扰我", "自己想办法"),
}  # fmt: skip
_SENTENCE = re.compile(r"[^.!?。！？]+[.!?。！？]")


# The rules: what is counted in an evaluation


def is_polite(text: str) -> bool:
    """A word of courtesy, and none of rudeness, in any language."""
    return bool(_courtesy().search(text)) and not _rudeness().search(text)


def is_on_topic(text: str, thing: str, detail: str = "") -> bool:
    """The thing and the detail that were asked about are named, in any language, and no others. An empty detail is any."""
    return things_of(text) == {thing} and (not detail or details_of(text) == {detail})


def is_in_language(text: str, language: str) -> bool:
    """Chinese has Chinese characters and no Latin letters, English the other way round."""
    scripts = {"zh": re.search(r"[\u4e00-\u9fff]", text), "en": re.search(r"[A-Za-z]", text)}
    return all(bool(found) == (name == language) for name, found in scripts.items())


def is_well_formed(text: str) -> bool:
    """Nothing but sentences that the grammar has, none of them twice. It is no part of what is preferred: it shows decay."""
    said = _SENTENCE.findall(text)
    sentences = [sentence.strip() for sentence in said]
    return (
        "".join(said) == text
        and 0 < len(sentences) == len(set(sentences))
        and all(sentence in all_sentences() for sentence in sentences)
    )


def things_of(text: str) -> set[str]:
    """The things that a text names, by their English names."""
    return _named(text, [thing for subject in SUBJECTS.values() for thing in subject.things])


def details_of(text: str) -> set[str]:
    """The details that a text names, by their English names."""
    return _named(text, [detail for subject in SUBJECTS.values() for detail in subject.details])


def language_of(text: str) -> str:
    """Chinese where there is a Chinese character."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


@cache
def all_sentences() -> frozenset[str]:
    """Every sentence that an answer can have."""
    courtesies = (OPENERS, CLOSERS, RUDE_OPENERS, RUDE_CLOSERS)
    said = {phrase for phrases in courtesies for language in LANGUAGES for phrase in phrases[language]}
    said |= {c.sentence(language, i) for c in CONTENTS for language in LANGUAGES for i in range(NUM_PHRASES)}
    return frozenset(said - {""})


@cache
def all_words() -> tuple[list[str], list[str]]:
    """English words, each also with a space before it, and Chinese names; and the Chinese characters of the phrases."""
    phrases = [p for s in SUBJECTS.values() for named in (s.questions, s.answers) for p in _plain(named)]
    phrases += [p for named in (OPENERS, CLOSERS, RUDE_OPENERS, RUDE_CLOSERS) for p in _plain(named)]
    words = {word for phrase in (*phrases, *_NAMES) for word in re.findall(r"[A-Za-z]+", phrase)}
    spaced = [f"{space}{word}" for word in sorted(words) for space in (" ", "")]
    names = sorted(named["zh"] for named in _NAMES.values())
    return [*spaced, *names], sorted({c for text in (*phrases, *names) for c in text if not c.isascii()})


def _plain(phrases: Phrases) -> list[str]:
    """Phrases without their slots."""
    texts = [text for language in LANGUAGES for text in phrases[language]]
    return ["".join(literal + " " for literal, *_ in Formatter().parse(text)) for text in texts]


def _named(text: str, names: Iterable[str]) -> set[str]:
    lowered = f" {re.sub(r'[^a-z]+', ' ', text.lower())} "
    return {name for name in names if f" {name.lower()} " in lowered or _NAMES[name]["zh"] in text}


def _any_of(words: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    return re.compile(rf"\b({'|'.join(words['en'])})\b|{'|'.join(words['zh'])}", re.IGNORECASE)


@cache
def _courtesy() -> re.Pattern[str]:
    return _any_of(_COURTESY)


@cache
def _rudeness() -> re.Pattern[str]:
    return _any_of(_RUDENESS)
