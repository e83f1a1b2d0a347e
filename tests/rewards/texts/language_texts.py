"""Texts with the share of their words that is in the language asked for. A row: (kind, language, text, share).

Of a mixed text the share is counted by hand, in words: one and a half Han characters are one. A share of None: no words.
"""

EN = [
    "First we subtract three from both sides, and then we divide by two.",
    "The train leaves the station at noon and arrives four hours later.",
    "To find the area of a circle, multiply the square of its radius by pi.",
    "She bought twelve apples, gave five of them to her brother, and ate two.",
    "Let me think about this step by step before I give the final answer.",
    "A prime number has no divisors except one and itself.",
    "If it rains tomorrow, the game will be moved to the sports hall.",
    "The function returns the largest element of the list.",
    "Water boils at a lower temperature on top of a mountain.",
    "Both methods lead to the same result, so the answer must be right.",
    "However, the second equation does not hold for negative values.",
    "My favourite book was written more than two hundred years ago.",
    "Please write your name at the top of the page.",
    "There are seven days in a week and twelve months in a year.",
]
ZH = [
    "首先两边同时减去三，然后再除以二。",
    "火车中午离开车站，四个小时以后到达。",
    "求圆的面积，要用半径的平方乘以圆周率。",
    "她买了十二个苹果，给了弟弟五个，自己吃了两个。",
    "让我一步一步地想清楚，再给出最后的答案。",
    "质数除了一和它本身以外没有别的因数。",
    "如果明天下雨，比赛就改在体育馆里进行。",
    "这个函数返回列表中最大的元素。",
    "在高山上，水的沸点会比较低。",
    "两种方法得到同样的结果，所以答案应该是对的。",
    "但是第二个方程对负数不成立。",
    "我最喜欢的书是两百多年前写的。",
    "請把你的名字寫在這一頁的最上面。",
    "一個星期有七天，一年有十二個月。",
]
ES = [
    "Primero restamos tres en ambos lados y después dividimos entre dos.",
    "El tren sale de la estación al mediodía y llega cuatro horas más tarde.",
    "Para hallar el área de un círculo se multiplica pi por el cuadrado del radio.",
    "Ella compró doce manzanas, le dio cinco a su hermano y se comió dos.",
    "Si mañana llueve, el partido se jugará en el pabellón.",
    "Un número primo no tiene más divisores que uno y él mismo.",
    "Los dos métodos llevan al mismo resultado, así que la respuesta es correcta.",
    "Mi libro favorito se escribió hace más de doscientos años.",
]
FR = [
    "On soustrait d'abord trois des deux côtés, puis on divise par deux.",
    "Le train quitte la gare à midi et arrive quatre heures plus tard.",
    "Pour trouver l'aire d'un cercle, on multiplie pi par le carré du rayon.",
    "Elle a acheté douze pommes, en a donné cinq à son frère et en a mangé deux.",
    "S'il pleut demain, le match aura lieu dans la salle de sport.",
    "Un nombre premier n'a pas d'autres diviseurs que un et lui-même.",
    "Les deux méthodes donnent le même résultat, donc la réponse est juste.",
    "Mon livre préféré a été écrit il y a plus de deux cents ans.",
]
DE = [
    "Zuerst ziehen wir auf beiden Seiten drei ab, dann teilen wir durch zwei.",
    "Der Zug verlässt den Bahnhof am Mittag und kommt vier Stunden später an.",
    "Um die Fläche eines Kreises zu finden, multipliziert man das Quadrat des Radius mit Pi.",
    "Sie kaufte zwölf Äpfel, gab ihrem Bruder fünf davon und aß zwei.",
    "Wenn es morgen regnet, findet das Spiel in der Halle statt.",
    "Eine Primzahl hat keine Teiler außer eins und sich selbst.",
    "Beide Wege führen zum gleichen Ergebnis, also muss die Antwort stimmen.",
    "Mein Lieblingsbuch wurde vor mehr als zweihundert Jahren geschrieben.",
]
JA = [
    "まず両辺から三を引いて、それから二で割ります。",
    "電車は正午に駅を出て、四時間後に着きます。",
    "円の面積を求めるには、半径の二乗に円周率をかけます。",
    "彼女はりんごを十二個買って、弟に五個あげました。",
    "明日雨が降ったら、試合は体育館で行われます。",
    "素数は一とその数自身のほかに約数を持ちません。",
    "どちらの方法でも同じ結果になるので、答えは正しいはずです。",
    "私の一番好きな本は二百年以上前に書かれました。",
]
KO = ["먼저 양변에서 삼을 빼고 나서 이로 나눕니다.", "기차는 정오에 역을 떠나 네 시간 뒤에 도착합니다."]
RU = [
    "Сначала вычтем три из обеих частей, а потом разделим на два.",
    "Поезд отходит от вокзала в полдень и прибывает через четыре часа.",
]
AR = ["أولا نطرح ثلاثة من الطرفين ثم نقسم على اثنين.", "يغادر القطار المحطة ظهرا ويصل بعد أربع ساعات."]
HI = ["पहले दोनों पक्षों से तीन घटाते हैं और फिर दो से भाग देते हैं।"]
EL = ["Πρώτα αφαιρούμε τρία και από τις δύο πλευρές και μετά διαιρούμε με το δύο."]
NL = [
    "Eerst trekken we aan beide kanten drie af, en dan delen we door twee.",
    "De trein vertrekt om twaalf uur en komt vier uur later aan.",
]
IT = [
    "Prima sottraiamo tre da entrambi i lati e poi dividiamo per due.",
    "Il treno parte dalla stazione a mezzogiorno e arriva quattro ore dopo.",
]
PT = [
    "Primeiro subtraímos três de ambos os lados e depois dividimos por dois.",
    "O trem sai da estação ao meio-dia e chega quatro horas mais tarde.",
]
PL = [
    "Najpierw odejmujemy trzy od obu stron, a potem dzielimy przez dwa.",
    "Pociąg odjeżdża ze stacji w południe i przyjeżdża cztery godziny później.",
]
TR = [
    "Önce her iki taraftan üç çıkarırız, sonra ikiye böleriz.",
    "Tren öğlen istasyondan ayrılır ve dört saat sonra varır.",
]
VI = ["Trước hết ta trừ cả hai vế cho ba rồi chia cho hai.", "Tàu rời ga lúc giữa trưa và đến nơi bốn giờ sau đó."]
UK = [
    "Спочатку віднімаємо три від обох частин, а потім ділимо на два.",
    "Потяг відходить від вокзалу опівдні та прибуває через чотири години.",
]

TEXTS: list[tuple[str, str, str, float | None]] = [
    *(("plain", "en", text, 1.0) for text in EN),
    *(("plain", "zh", text, 1.0) for text in ZH),
    *(("plain", "es", text, 1.0) for text in ES),
    *(("plain", "fr", text, 1.0) for text in FR),
    *(("plain", "de", text, 1.0) for text in DE),
    *(("plain", "ja", text, 1.0) for text in JA),
    *(("plain", "ko", text, 1.0) for text in KO),
    *(("plain", "ru", text, 1.0) for text in RU),
    *(("plain", "ar", text, 1.0) for text in AR),
    *(("plain", "hi", text, 1.0) for text in HI),
    *(("plain", "el", text, 1.0) for text in EL),
    *(("plain", "nl", text, 1.0) for text in NL),
    *(("plain", "it", text, 1.0) for text in IT),
    *(("plain", "pt", text, 1.0) for text in PT),
    *(("plain", "pl", text, 1.0) for text in PL),
    *(("plain", "tr", text, 1.0) for text in TR),
    *(("plain", "vi", text, 1.0) for text in VI),
    *(("plain", "uk", text, 1.0) for text in UK),
    # The right language was not kept to: another script.
    *(("script", "zh", text, 0.0) for text in [*EN[:6], *DE[:2], *RU, *KO]),
    *(("script", "en", text, 0.0) for text in [*ZH[:6], *JA[:2], *RU, *KO, *AR, *HI, *EL]),
    # Chinese and Japanese share characters.
    *(("eastern", "zh", text, 0.0) for text in JA),
    *(("eastern", "ja", text, 0.0) for text in ZH),
    # Another language of the same script.
    *(("latin", "en", text, 0.0) for text in [*ES, *FR, *DE, *NL, *IT, *PT, *PL, *TR, *VI]),
    *(("latin", "nl", text, 0.0) for text in [*EN[:6], *DE[:2]]),
    *(("latin", "pt", text, 0.0) for text in [*EN[:4], *IT]),
    *(("latin", "es", text, 0.0) for text in [*EN[:6], *FR[:3], *DE[:2]]),
    *(("latin", "fr", text, 0.0) for text in [*EN[6:12], *ES[:3], *DE[:2]]),
    *(("latin", "de", text, 0.0) for text in [*EN[:6], *FR[3:6]]),
    # Short ones.
    ("short", "en", "Yes.", 1.0),
    ("short", "en", "The answer is 5.", 1.0),
    ("short", "en", "So x = 5.", 1.0),
    ("short", "en", "Add 5: 3x = 15", 1.0),
    ("short", "en", "Divide by 3.", 1.0),
    ("short", "en", "Paris", 1.0),
    ("short", "en", "It is a cat.", 1.0),
    ("short", "en", "Thank you!", 1.0),
    ("short", "en", "Good morning", 1.0),
    ("short", "en", "No, it is not.", 1.0),
    ("short", "en", "是", 0.0),
    ("short", "en", "答案是 5。", 0.0),
    ("short", "en", "所以 x = 5", 0.0),
    ("short", "en", "La respuesta es 5.", 0.0),
    ("short", "en", "Die Antwort ist 5.", 0.0),
    ("short", "en", "La réponse est 5.", 0.0),
    ("short", "zh", "是", 1.0),
    ("short", "zh", "对。", 1.0),
    ("short", "zh", "答案是 5。", 1.0),
    ("short", "zh", "所以 x = 5", 1.0),
    ("short", "zh", "除以 3：x = 15 / 3", 1.0),
    ("short", "zh", "加 5：3x = 10 + 5", 1.0),
    ("short", "zh", "巴黎", 1.0),
    ("short", "zh", "谢谢！", 1.0),
    ("short", "zh", "Yes.", 0.0),
    ("short", "zh", "The answer is 5.", 0.0),
    ("short", "zh", "Divide by 3: x = 15 / 3", 0.0),
    ("short", "zh", "答えは五です。", 0.0),
    ("short", "ja", "はい。", 1.0),
    ("short", "ja", "東京", 1.0),
    ("short", "es", "La respuesta es 5.", 1.0),
    ("short", "fr", "La réponse est 5.", 1.0),
    ("short", "de", "Die Antwort ist 5.", 1.0),
    ("short", "es", "The answer is 5.", 0.0),
    # Code is in no language.
    ("code", "zh", "这个函数求和：\n```python\ndef total(numbers):\n    # add all of them up and return\n    return sum(numbers)\n```\n它很简单。", 1.0),
    ("code", "zh", "用 `print(\"hello world\")` 输出一行文字。", 1.0),
    ("code", "zh", "先定义变量 my_value 和 maxCount，再调用函数。", 1.0),
    ("code", "zh", "代码如下：\n```\nfor item in items:\n    print(item)", 1.0),
    ("code", "en", "The loop is simple:\n```python\n# 把所有的数加起来\nfor n in numbers:\n    total += n\n```\nIt adds all the numbers up.", 1.0),
    ("code", "en", "Call `打印(你好)` once and look at the output.", 1.0),
    ("code", "en", "```python\nprint('only code here')\n```", None),
    ("code", "zh", "```\nwhile True:\n    pass\n```", None),
    ("code", "zh", "请看 https://example.org/some/long/english/path/name 这一页。", 1.0),
    ("code", "en", "See https://example.org/某个/页面 for more about this.", 1.0),
    ("code", "zh", "<think>\n先想一想。\n</think>\n<answer>\n五\n</answer>", 1.0),
    ("code", "en", "~~~\n全部都是代码\n~~~\nThat is all there is to it.", 1.0),
    # Formulas are in no language.
    ("formula", "zh", "由 $a^2 + b^2 = c^2$ 可得 $c = 5$。", 1.0),
    ("formula", "zh", "所以 \\(\\text{area} = \\pi r^2\\) 就是面积。", 1.0),
    ("formula", "zh", "因此\\[\\int_0^1 x\\,\\mathrm{d}x = \\frac{1}{2}\\]这就是结果。", 1.0),
    ("formula", "zh", "答案是 \\boxed{\\text{five apples}}。", 1.0),
    ("formula", "zh", "$$\\text{distance} = \\text{speed} \\times \\text{time}$$ 代入即可。", 1.0),
    ("formula", "zh", "速度是 60 km/h，时间是 2 h，路程是 120 km。", 1.0),
    ("formula", "zh", "设 x = 3，y = 4，那么 z = x + y = 7。", 1.0),
    ("formula", "zh", "f(x) = sin(x) + cos(x) 是周期函数。", 1.0),
    ("formula", "en", "By $\\text{面积} = a \\times b$ we get the area.", 1.0),
    ("formula", "en", "Therefore \\boxed{五} is the answer that we want.", 1.0),
    ("formula", "en", "x = 5", None),
    ("formula", "zh", "3x = 10 + 5\n3x = 15\nx = 15 / 3\nx = 5", None),
    ("formula", "en", "$$E = mc^2$$", None),
    ("formula", "zh", "12 + 30 = 42", None),
    ("formula", "en", "", None),
    ("formula", "en", "2024-05-01 12:30", None),
    # Names and terms in another script belong to a text.
    ("names", "zh", "我昨天在 Berlin 见到了 Anna Schmidt，她在 Google 工作。", 1.0),
    ("names", "zh", "这个模型用 GRPO 和 PPO 两种方法训练，效果都不错。", 1.0),
    ("names", "zh", "Tom 有三个苹果，Mary 又给了他四个。", 1.0),
    ("names", "zh", "《哈姆雷特》的作者是 Shakespeare。", 1.0),
    ("names", "zh", "我用 Python 写了一个小程序来验证这个结论。", 1.0),
    ("names", "ja", "昨日は Microsoft の新しい製品について話しました。", 1.0),
    ("names", "ru", "Вчера я установил Linux и Firefox на свой компьютер.", 1.0),
    ("names", "ko", "어제 친구와 함께 Netflix 에서 영화를 보았습니다.", 1.0),
    # Mixed, with the share by hand.
    ("mixed", "zh", "首先我们把两边同时减去三。Then we divide both sides by the number two.", 12 / 1.5 / (12 / 1.5 + 9)),
    ("mixed", "en", "首先我们把两边同时减去三。Then we divide both sides by the number two.", 9 / (12 / 1.5 + 9)),
    ("mixed", "zh", "我 think 这个 problem 很 hard，但是可以 solve。", 10 / 1.5 / (10 / 1.5 + 4)),
    ("mixed", "en", "Let me see. 让我想一想这个问题怎么做。 The answer is five.", 7 / (7 + 12 / 1.5)),
    ("mixed", "zh", "让我想一想这个问题怎么做。The answer is five.", 12 / 1.5 / (12 / 1.5 + 4)),
    ("mixed", "zh", "Wait, let me check this again. 三乘以四等于十二，所以答案是十二。", 15 / 1.5 / (15 / 1.5 + 6)),
    ("mixed", "en", "We know that the sum is ten. 所以另一个数是三。", 7 / (7 + 8 / 1.5)),
    ("mixed", "en", EN[0] + "\n" + ES[0] + "\n" + EN[1] + "\n" + ES[1], 25 / 49),
    ("mixed", "es", EN[0] + "\n" + ES[0] + "\n" + EN[1] + "\n" + ES[1], 24 / 49),
    ("mixed", "en", "\n".join([*EN[:6], *DE[:2]]), 74 / 100),
    ("mixed", "zh", "\n".join([*ZH[:3], JA[0]]), 0.7),
    ("mixed", "ja", "\n".join([*JA[:3], ZH[3], ZH[4]]), 0.6),
    ("mixed", "zh", ZH[0] + EN[0], 15 / 1.5 / (15 / 1.5 + 13)),
    ("mixed", "ru", RU[0] + " " + EN[1], 11 / 23),
]  # fmt: skip
