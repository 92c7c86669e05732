"""The small world of the embedded tasks: its words, and the tables that are read from them.

Left out are words with two common translations, opposites, categories or colors: every question
has one right answer.
"""

DICTIONARY = """dog Hund perro cane; cat Katze gato gatto; horse Pferd caballo cavallo; cow Kuh vaca
mucca; pig Schwein cerdo maiale; sheep Schaf oveja pecora; goat Ziege cabra capra; mouse Maus ratón
topo; bird Vogel pájaro uccello; fish Fisch pez pesce; lion Löwe león leone; tiger Tiger tigre
tigre; bear Bär oso orso; wolf Wolf lobo lupo; fox Fuchs zorro volpe; rabbit Kaninchen conejo
coniglio; duck Ente pato anatra; frog Frosch rana rana; snake Schlange serpiente serpente; spider
Spinne araña ragno; monkey Affe mono scimmia; apple Apfel manzana mela; pear Birne pera pera; lemon
Zitrone limón limone; grape Traube uva uva; bread Brot pan pane; cheese Käse queso formaggio; milk
Milch leche latte; water Wasser agua acqua; tea Tee té tè; coffee Kaffee café caffè; sugar Zucker
azúcar zucchero; salt Salz sal sale; egg Ei huevo uovo; house Haus casa casa; door Tür puerta porta;
window Fenster ventana finestra; table Tisch mesa tavolo; chair Stuhl silla sedia; bed Bett cama
letto; kitchen Küche cocina cucina; key Schlüssel llave chiave; knife Messer cuchillo coltello; sun
Sonne sol sole; moon Mond luna luna; star Stern estrella stella; sky Himmel cielo cielo; rain Regen
lluvia pioggia; snow Schnee nieve neve; fire Feuer fuego fuoco; sea Meer mar mare; river Fluss río
fiume; forest Wald bosque bosco; tree Baum árbol albero; flower Blume flor fiore; leaf Blatt hoja
foglia; stone Stein piedra pietra; ice Eis hielo ghiaccio; head Kopf cabeza testa; eye Auge ojo
occhio; ear Ohr oreja orecchio; nose Nase nariz naso; mouth Mund boca bocca; tooth Zahn diente
dente; hand Hand mano mano; foot Fuß pie piede; arm Arm brazo braccio; leg Bein pierna gamba; finger
Finger dedo dito; heart Herz corazón cuore; blood Blut sangre sangue; man Mann hombre uomo; woman
Frau mujer donna; child Kind niño bambino; mother Mutter madre madre; father Vater padre padre;
brother Bruder hermano fratello; sister Schwester hermana sorella; son Sohn hijo figlio; friend
Freund amigo amico; king König rey re; queen Königin reina regina; doctor Arzt médico medico; book
Buch libro libro; school Schule escuela scuola; bridge Brücke puente ponte; street Straße calle
strada; city Stadt ciudad città; train Zug tren treno; ship Schiff barco nave; hat Hut sombrero
cappello; shirt Hemd camisa camicia; shoe Schuh zapato scarpa; gold Gold oro oro; day Tag día
giorno; night Nacht noche notte; summer Sommer verano estate; winter Winter invierno inverno; red
rot rojo rosso; green grün verde verde; blue blau azul blu; yellow gelb amarillo giallo; white weiß
blanco bianco; black schwarz negro nero; gray grau gris grigio; big groß grande grande; small klein
pequeño piccolo; new neu nuevo nuovo; young jung joven giovane; good gut bueno buono; cold kalt frío
freddo; strong stark fuerte forte; full voll lleno pieno; sad traurig triste triste; dry trocken
seco secco; clean sauber limpio pulito; life Leben vida vita; death Tod muerte morte; war Krieg
guerra guerra; song Lied canción canzone"""

CATEGORIES = """animal: dog cat horse cow pig goat sheep lion tiger wolf rabbit monkey zebra camel
donkey mouse; fruit: apple pear banana cherry grape peach plum mango melon apricot lemon papaya
strawberry; vegetable: carrot onion potato cabbage spinach broccoli lettuce garlic radish leek
turnip; color: red green blue yellow white black brown pink purple gray beige; body part: head eye
ear nose mouth hand foot arm leg knee neck finger elbow shoulder; clothing: shirt shoe hat coat
glove sock skirt jacket scarf sweater trousers boot; furniture: table chair bed sofa desk bench
shelf stool armchair couch bookcase; tool: hammer axe drill shovel rake wrench chisel spade;
vehicle: car bus truck train tram bicycle airplane ship boat taxi van scooter; drink: water milk tea
coffee juice wine beer lemonade cider cocoa; instrument: piano guitar violin flute drum trumpet harp
cello clarinet banjo; metal: iron gold silver copper tin steel zinc bronze nickel; job: doctor
teacher baker farmer nurse pilot painter lawyer judge barber plumber dentist tailor; sport: tennis
football golf hockey boxing rugby baseball skiing judo basketball; flower: rose tulip daisy lily
orchid poppy daffodil sunflower; shape: circle square triangle rectangle oval hexagon pentagon;
relative: mother father brother sister son daughter uncle aunt cousin; country: France Spain Italy
Germany Japan China Egypt Kenya Canada Cuba Chile Norway; city: Paris Madrid Rome Berlin Tokyo
Vienna Cairo Nairobi Ottawa Lima Oslo Moscow"""

COLORS = """yellow: lemon banana sun corn canary duckling sunflower mustard butter; white: snow milk
salt sugar flour chalk cotton swan rice pearl tooth igloo; black: coal tar soot crow raven panther
ink tire; green: grass leaf frog pea cucumber spinach lettuce broccoli cactus clover moss fern ivy
lime emerald; red: blood tomato strawberry ruby cherry ladybug lobster ketchup raspberry brick;
blue: sky sea sapphire ocean blueberry jeans; orange: carrot pumpkin tangerine apricot mandarin
basketball; brown: chocolate mud wood bark soil bear walnut chestnut cocoa cinnamon acorn; pink: pig
flamingo piglet bubblegum salmon; gray: elephant mouse ash cement donkey rhino shark dolphin koala
concrete; purple: plum eggplant lavender amethyst"""

CAPITALS = """France Paris; Germany Berlin; Italy Rome; Spain Madrid; Portugal Lisbon; England
London; Ireland Dublin; Scotland Edinburgh; Wales Cardiff; Norway Oslo; Sweden Stockholm; Denmark
Copenhagen; Finland Helsinki; Iceland Reykjavik; Poland Warsaw; Austria Vienna; Hungary Budapest;
Greece Athens; Turkey Ankara; Russia Moscow; Ukraine Kyiv; Romania Bucharest; Bulgaria Sofia; Serbia
Belgrade; Croatia Zagreb; Slovakia Bratislava; Albania Tirana; Belgium Brussels; Switzerland Bern;
Latvia Riga; Lithuania Vilnius; Estonia Tallinn; Belarus Minsk; Malta Valletta; Cyprus Nicosia;
Georgia Tbilisi; Armenia Yerevan; Egypt Cairo; Libya Tripoli; Tunisia Tunis; Algeria Algiers;
Morocco Rabat; Sudan Khartoum; Kenya Nairobi; Uganda Kampala; Tanzania Dodoma; Rwanda Kigali;
Somalia Mogadishu; Nigeria Abuja; Ghana Accra; Senegal Dakar; Mali Bamako; Niger Niamey; Angola
Luanda; Zambia Lusaka; Zimbabwe Harare; Namibia Windhoek; Gabon Libreville; Gambia Banjul; Jordan
Amman; Lebanon Beirut; Syria Damascus; Iraq Baghdad; Iran Tehran; Qatar Doha; Oman Muscat;
Afghanistan Kabul; Pakistan Islamabad; Nepal Kathmandu; Bangladesh Dhaka; Thailand Bangkok; Vietnam
Hanoi; Laos Vientiane; Japan Tokyo; China Beijing; Taiwan Taipei; Australia Canberra; Fiji Suva;
Canada Ottawa; Cuba Havana; Jamaica Kingston; Colombia Bogota; Venezuela Caracas; Ecuador Quito;
Peru Lima; Chile Santiago; Uruguay Montevideo; Paraguay Asuncion; Brazil Brasilia"""

PLURALS = """sheep sheep; man men; woman women; child children; foot feet; tooth teeth; mouse mice;
goose geese; ox oxen; leaf leaves; knife knives; wolf wolves; wife wives; life lives; loaf loaves;
shelf shelves; thief thieves; potato potatoes; tomato tomatoes; hero heroes"""

NOUNS = """bird bear fox duck frog snake bee ant spider whale egg onion house door window key spoon
plate bottle lamp mirror star cloud river lake island forest tree stone eye ear nose hand arm leg
brother sister friend king queen book school church bridge street city hat shirt shoe day night week
month year hour song word box brush glass watch dress beach peach lady party story toy boy girl wall
road ball cup pen ring"""

PAST = """go went; see saw; eat ate; come came; take took; give gave; make made; know knew; get got;
find found; think thought; say said; tell told; run ran; write wrote; read read; sing sang; swim
swam; drink drank; begin began; drive drove; ride rode; fly flew; grow grew; throw threw; draw drew;
blow blew; buy bought; catch caught; teach taught; fight fought; sleep slept; keep kept; feel felt;
leave left; meet met; send sent; spend spent; build built; lose lost; win won; sit sat; stand stood;
hold held; hear heard; speak spoke; break broke; steal stole; choose chose; wear wore; forget
forgot; hide hid; bite bit; fall fell; cut cut; put put; hit hit; pay paid; sell sold; feed fed;
shake shook; rise rose; do did; have had; walk walked; talk talked; play played; work worked; look
looked; ask asked; call called; help helped; jump jumped; open opened; close closed; wash washed;
watch watched; push pushed; pull pulled; cook cooked; clean cleaned; paint painted; wait waited;
need needed; live lived; love loved; like liked; move moved; dance danced; bake baked; smile smiled;
use used; hope hoped; try tried; cry cried; carry carried; stop stopped; plan planned; drop dropped;
climb climbed; count counted; answer answered; listen listened; turn turned; laugh laughed; kick
kicked; finish finished"""

OPPOSITES = """hot cold; warm cool; big small; fast slow; early late; rich poor; full empty; wet
dry; clean dirty; happy sad; good bad; up down; in out; on off; day night; black white; yes no;
north south; east west; love hate; win lose; buy sell; push pull; give take; come go; first last;
above below; near far; inside outside; before after; always never; more less; most least; many few;
high low; wide narrow; strong weak; deep shallow; smooth rough; tight loose; safe dangerous; cheap
expensive; true false; front back; top bottom; alive dead; asleep awake; wise foolish; summer
winter; laugh cry; friend enemy; war peace; male female; import export; include exclude; increase
decrease; ancient modern; borrow lend; forget remember; positive negative; possible impossible;
lucky unlucky; pack unpack; appear disappear; agree disagree; honest dishonest; guilty innocent;
public private; sunrise sunset; birth death; everything nothing"""

ONE_WAY = """thick thin; closed open; rude polite; tall short; long short; young old; new old; dark
light; heavy light; left right; wrong right; loud quiet"""

PEOPLE = "Tom Ann Bob Eva Max Lea Ben Mia Sam Zoe Jim Amy Leo Kim Dan Sue Paul Nora Karl Lisa"

SMALL_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen"""

TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def _rows(text):
    """'a b; c d' -> [['a', 'b'], ['c', 'd']]."""
    return list(map(str.split, text.split(";")))


def _groups(text):
    """'answer: x x x; ...' -> {x: answer}."""
    answer_of = {}
    for group in text.split(";"):
        answer, members = group.split(":")
        answer_of |= dict.fromkeys(members.split(), " ".join(answer.split()))
    return answer_of


def plural(noun: str) -> str:
    """The regular plural."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def number_words(n: int) -> str:
    """0 to 999 in English words, American style: 'three hundred twenty-one'."""
    small = SMALL_NUMBERS.split()
    if n >= 100:
        return f"{small[n // 100]} hundred" + (f" {number_words(n % 100)}" if n % 100 else "")
    if n < 20:
        return small[n]
    tens = TENS.split()[n // 10 - 2]
    return f"{tens}-{small[n % 10]}" if n % 10 else tens


def roman(n: int) -> str:
    """1 to 399 as a Roman numeral."""
    ones = ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"]
    tens = ["", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"]
    return "C" * (n // 100) + tens[n // 10 % 10] + ones[n % 10]


TRANSLATIONS = _rows(DICTIONARY)
CATEGORY = _groups(CATEGORIES)
COLOR = _groups(COLORS)
CAPITAL = dict(_rows(CAPITALS))
PAST_TENSE = dict(_rows(PAST))
_COUNTABLE = ("animal", "furniture", "tool", "vehicle", "instrument", "job", "flower", "shape")
_NOUNS = NOUNS.split() + [noun for noun, kind in CATEGORY.items() if kind in _COUNTABLE]
PLURAL = dict(zip(_NOUNS, map(plural, _NOUNS), strict=True)) | dict(_rows(PLURALS))
_PAIRS = dict(_rows(OPPOSITES))
OPPOSITE = _PAIRS | {b: a for a, b in _PAIRS.items()} | dict(_rows(ONE_WAY))
_SPELLABLE = {row[0] for row in TRANSLATIONS} | CATEGORY.keys() | COLOR.keys() | PLURAL.keys()
WORDS = sorted(w for w in _SPELLABLE if 3 <= len(w) <= 6 and w.isalpha() and w.islower())
