"""Tables of facts, words and phrasings that the demo model's dialogues are made of.

Plain data, parsed from compact strings (`key=value` pairs separated by blanks, `_` for a blank inside a name).
It knows nothing of dialogues, splits or tokens. `demo_data.py` reads it, nobody else.
"""

from __future__ import annotations

# fmt: off


def _pairs(text: str) -> dict[str, str]:
    return {k.replace("_", " "): v.replace("_", " ") for k, v in (item.split("=") for item in text.split())}


def _words(text: str) -> list[str]:
    return [word.replace("_", " ") for word in text.split()]


CAPITALS = _pairs(
    "France=Paris Germany=Berlin Italy=Rome Spain=Madrid Portugal=Lisbon England=London Ireland=Dublin "
    "Scotland=Edinburgh "
    "Wales=Cardiff Austria=Vienna Switzerland=Bern Belgium=Brussels the_Netherlands=Amsterdam "
    "Denmark=Copenhagen "
    "Sweden=Stockholm Norway=Oslo Finland=Helsinki Iceland=Reykjavik Poland=Warsaw Hungary=Budapest "
    "Czechia=Prague "
    "Slovakia=Bratislava Slovenia=Ljubljana Croatia=Zagreb Serbia=Belgrade Romania=Bucharest Bulgaria=Sofia "
    "Greece=Athens "
    "Turkey=Ankara Ukraine=Kyiv Russia=Moscow Estonia=Tallinn Latvia=Riga Lithuania=Vilnius Albania=Tirana "
    "Malta=Valletta "
    "Cyprus=Nicosia Egypt=Cairo Morocco=Rabat Algeria=Algiers Tunisia=Tunis Libya=Tripoli Nigeria=Abuja "
    "Ghana=Accra "
    "Kenya=Nairobi Ethiopia=Addis_Ababa Uganda=Kampala Rwanda=Kigali Senegal=Dakar Mali=Bamako Angola=Luanda "
    "Zambia=Lusaka "
    "Zimbabwe=Harare Namibia=Windhoek Madagascar=Antananarivo China=Beijing Japan=Tokyo India=New_Delhi "
    "Pakistan=Islamabad "
    "Bangladesh=Dhaka Nepal=Kathmandu Thailand=Bangkok Vietnam=Hanoi Indonesia=Jakarta Malaysia=Kuala_Lumpur "
    "the_Philippines=Manila South_Korea=Seoul Mongolia=Ulaanbaatar Iran=Tehran Iraq=Baghdad Jordan=Amman "
    "Lebanon=Beirut "
    "Syria=Damascus Saudi_Arabia=Riyadh Qatar=Doha Oman=Muscat Afghanistan=Kabul Australia=Canberra "
    "New_Zealand=Wellington "
    "Canada=Ottawa the_United_States=Washington Mexico=Mexico_City Cuba=Havana Jamaica=Kingston "
    "Guatemala=Guatemala_City "
    "Honduras=Tegucigalpa Nicaragua=Managua Costa_Rica=San_Jose Panama=Panama_City Colombia=Bogota "
    "Venezuela=Caracas "
    "Ecuador=Quito Peru=Lima Chile=Santiago Argentina=Buenos_Aires Uruguay=Montevideo Paraguay=Asuncion "
    "Brazil=Brasilia")
CONTINENTS = _pairs(
    "France=Europe Germany=Europe Italy=Europe Spain=Europe Poland=Europe Sweden=Europe Greece=Europe "
    "Norway=Europe "
    "Egypt=Africa Kenya=Africa Nigeria=Africa Ghana=Africa Morocco=Africa China=Asia Japan=Asia India=Asia "
    "Thailand=Asia "
    "Vietnam=Asia Nepal=Asia Canada=North_America Mexico=North_America Cuba=North_America "
    "Brazil=South_America "
    "Peru=South_America Chile=South_America Argentina=South_America")
CURRENCIES = _pairs(
    "Japan=yen India=rupee England=pound France=euro Germany=euro Italy=euro Spain=euro China=yuan "
    "Russia=ruble "
    "Sweden=krona Norway=krone Denmark=krone Poland=zloty Hungary=forint Switzerland=franc Mexico=peso "
    "Brazil=real "
    "Turkey=lira Thailand=baht Vietnam=dong South_Korea=won Israel=shekel Kenya=shilling")
LANGUAGES = _pairs(
    "France=French Germany=German Italy=Italian Spain=Spanish Portugal=Portuguese England=English "
    "Brazil=Portuguese "
    "Mexico=Spanish Japan=Japanese China=Chinese Russia=Russian Poland=Polish Greece=Greek Sweden=Swedish "
    "Norway=Norwegian "
    "Denmark=Danish Finland=Finnish Hungary=Hungarian Turkey=Turkish Egypt=Arabic Iran=Persian Thailand=Thai "
    "Vietnam=Vietnamese South_Korea=Korean Austria=German Argentina=Spanish")
COLOURS = _pairs(
    "the_sky=blue grass=green snow=white blood=red a_banana=yellow a_lemon=yellow the_sun=yellow "
    "a_carrot=orange "
    "a_pumpkin=orange a_tomato=red a_strawberry=red a_cherry=red coal=black milk=white salt=white "
    "sugar=white "
    "chocolate=brown a_frog=green a_flamingo=pink a_pig=pink a_crow=black a_raven=black a_swan=white "
    "a_polar_bear=white "
    "an_elephant=grey a_mouse=grey a_lime=green a_cucumber=green spinach=green broccoli=green the_sea=blue "
    "a_blueberry=blue an_aubergine=purple lavender=purple a_fire_engine=red gold=yellow silver=grey "
    "ink=black a_lion=yellow")
OPPOSITES = _pairs(
    "hot=cold big=small tall=short long=short up=down left=right good=bad happy=sad fast=slow day=night "
    "black=white "
    "open=closed old=young new=old early=late full=empty rich=poor strong=weak hard=soft wet=dry clean=dirty "
    "light=dark "
    "heavy=light loud=quiet high=low near=far in=out on=off yes=no true=false begin=end start=stop win=lose "
    "love=hate "
    "buy=sell give=take push=pull come=go first=last always=never easy=difficult cheap=expensive thick=thin "
    "wide=narrow "
    "deep=shallow sharp=blunt sweet=sour brave=afraid safe=dangerous alive=dead awake=asleep above=below "
    "inside=outside "
    "before=after front=back top=bottom north=south east=west summer=winter morning=evening question=answer "
    "friend=enemy "
    "war=peace noisy=quiet smooth=rough lazy=busy laugh=cry remember=forget arrive=leave ugly=beautiful "
    "cruel=kind "
    "polite=rude tight=loose raw=cooked straight=crooked arrival=departure success=failure victory=defeat")
SOUNDS = _pairs(
    "cat=meow dog=woof cow=moo sheep=baa duck=quack pig=oink horse=neigh lion=roar frog=croak bee=buzz "
    "snake=hiss owl=hoot "
    "mouse=squeak rooster=cock-a-doodle-doo donkey=hee-haw wolf=howl crow=caw goat=bleat turkey=gobble")
YOUNG = _pairs(
    "cat=kitten dog=puppy cow=calf sheep=lamb duck=duckling pig=piglet horse=foal lion=cub bear=cub "
    "frog=tadpole goat=kid "
    "hen=chick deer=fawn kangaroo=joey swan=cygnet goose=gosling owl=owlet elephant=calf whale=calf fox=cub "
    "seal=pup")
HOMES = _pairs(
    "bee=hive bird=nest dog=kennel horse=stable pig=sty lion=den rabbit=burrow spider=web fish=water "
    "bear=den cow=barn "
    "fox=den mouse=hole ant=anthill")
LEGS = _pairs(
    "cat=four dog=four spider=eight bird=two ant=six bee=six horse=four snake=no fish=no chicken=two "
    "cow=four octopus=no "
    "human=two beetle=six butterfly=six duck=two elephant=four crab=ten")
PLURALS = _pairs(
    "mouse=mice child=children man=men woman=women foot=feet tooth=teeth goose=geese ox=oxen sheep=sheep "
    "fish=fish "
    "leaf=leaves knife=knives wolf=wolves life=lives wife=wives half=halves city=cities baby=babies "
    "box=boxes bus=buses "
    "potato=potatoes tomato=tomatoes person=people cat=cats dog=dogs book=books house=houses cactus=cacti")
PASTS = _pairs(
    "go=went see=saw eat=ate run=ran come=came take=took give=gave make=made write=wrote read=read sing=sang "
    "swim=swam "
    "drink=drank buy=bought bring=brought think=thought teach=taught catch=caught find=found know=knew "
    "grow=grew fly=flew "
    "drive=drove speak=spoke break=broke sleep=slept keep=kept leave=left feel=felt tell=told sell=sold "
    "win=won walk=walked "
    "talk=talked play=played jump=jumped be=was have=had do=did say=said begin=began")
SYMBOLS = _pairs(
    "hydrogen=H helium=He carbon=C nitrogen=N oxygen=O sodium=Na iron=Fe copper=Cu silver=Ag gold=Au lead=Pb "
    "tin=Sn "
    "zinc=Zn calcium=Ca potassium=K chlorine=Cl sulphur=S neon=Ne mercury=Hg uranium=U magnesium=Mg "
    "lithium=Li")
SIDES = _pairs("triangle=three square=four rectangle=four pentagon=five hexagon=six heptagon=seven "
               "octagon=eight decagon=ten")
NUMBERS = _words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                 "fifteen sixteen "
                 "seventeen eighteen nineteen twenty")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
_LENGTHS = dict(zip(MONTHS, "31 28 31 30 31 30 31 31 30 31 30 31".split(), strict=True))
_ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
PLANETS = _words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")


def _next(ring: list[str], by: int) -> dict[str, str]:
    return {word: ring[(i + by) % len(ring)] for i, word in enumerate(ring)}


# name: (table, answer pattern, question patterns). {k} is the key, {v} the value.
TABLES: dict[str, tuple[dict[str, str], str, list[str]]] = {
    "capital": (CAPITALS, "The capital of {k} is {v}.",
                ["What is the capital of {k}?", "Tell me the capital of {k}.",
                 "Which city is the capital of {k}?",
                 "What's the capital city of {k}?", "{k} has which capital?", "Capital of {k}?",
                 "Name the capital of {k}.",
                 "Do you know the capital of {k}?"]),
    "country": ({v: k for k, v in CAPITALS.items()}, "{k} is the capital of {v}.",
                ["Which country has the capital {k}?", "{k} is the capital of which country?",
                 "What country is {k} the capital of?", "Of which country is {k} the capital?",
                 "Where is {k}?"]),
    "continent": (CONTINENTS, "{k} is in {v}.",
                  ["On which continent is {k}?", "Which continent is {k} in?",
                   "What continent does {k} belong to?",
                   "In what part of the world is {k}?"]),
    "currency": (CURRENCIES, "The currency of {k} is the {v}.",
                 ["What is the currency of {k}?", "Which currency does {k} use?",
                  "What money do people use in {k}?",
                  "Which money is used in {k}?"]),
    "language": (LANGUAGES, "People in {k} speak {v}.",
                 ["What language do people speak in {k}?", "Which language is spoken in {k}?",
                  "What is the language of {k}?", "What do they speak in {k}?"]),
    "colour": (COLOURS, "The colour of {k} is {v}.",
               ["What colour is {k}?", "What color is {k}?", "Which colour does {k} have?",
                "What is the colour of {k}?",
                "Tell me the colour of {k}.", "What is the color of {k}?"]),
    "opposite": (OPPOSITES, "The opposite of {k} is {v}.",
                 ["What is the opposite of {k}?", "Opposite of {k}?", "Tell me the opposite of {k}.",
                  "Which word is the opposite of {k}?", "Give me the opposite of the word {k}.",
                  "{k} is the opposite of what?"]),
    "sound": (SOUNDS, "A {k} says {v}.",
              ["What does a {k} say?", "What sound does a {k} make?", "Which noise does a {k} make?",
               "How does a {k} sound?"]),
    "young": (YOUNG, "A young {k} is called a {v}.",
              ["What is a young {k} called?", "What do you call a baby {k}?",
               "What is the name for a young {k}?",
               "How do we call a baby {k}?"]),
    "home": (HOMES, "The home of a {k}: {v}.",
             ["Where does a {k} live?", "What is the home of a {k}?", "What is the home of a {k} called?"]),
    "legs": (LEGS, "A {k} has {v} legs.",
             ["How many legs does a {k} have?", "How many legs has a {k}?",
              "Tell me how many legs a {k} has.",
              "What number of legs does a {k} have?"]),
    "plural": (PLURALS, "The plural of {k} is {v}.",
               ["What is the plural of {k}?", "Plural of {k}?", "Tell me the plural of {k}.",
                "What is more than one {k} called?"]),
    "past": (PASTS, "The past tense of {k} is {v}.",
             ["What is the past tense of {k}?", "Past tense of {k}?", "Tell me the past tense of {k}.",
              "What is the past of the verb {k}?"]),
    "symbol": (SYMBOLS, "The chemical symbol of {k} is {v}.",
               ["What is the chemical symbol of {k}?", "Which symbol does {k} have?",
                "What is the symbol for {k}?",
                "Tell me the chemical symbol for {k}."]),
    "element": ({v: k for k, v in SYMBOLS.items()}, "{k} is the chemical symbol of {v}.",
                ["Which element has the symbol {k}?", "What element is {k}?",
                 "{k} is the symbol of which element?"]),
    "sides": (SIDES, "A {k} has {v} sides.",
              ["How many sides does a {k} have?", "How many sides has a {k}?",
               "Tell me how many sides a {k} has."]),
    "next_day": (_next(DAYS, 1), "The day after {k} is {v}.",
                 ["What day comes after {k}?", "Which day follows {k}?", "What is the day after {k}?",
                  "If today is {k}, what day is tomorrow?"]),
    "last_day": (_next(DAYS, -1), "The day before {k} is {v}.",
                 ["What day comes before {k}?", "Which day is before {k}?", "What is the day before {k}?",
                  "If today is {k}, what day was yesterday?"]),
    "next_month": (_next(MONTHS, 1), "The month after {k} is {v}.",
                   ["What month comes after {k}?", "Which month follows {k}?",
                    "What is the month after {k}?"]),
    "last_month": (_next(MONTHS, -1), "The month before {k} is {v}.",
                   ["What month comes before {k}?", "Which month is before {k}?",
                    "What is the month before {k}?"]),
    "month_days": (_LENGTHS, "{k} has {v} days.",
                   ["How many days does {k} have?", "How many days are in {k}?", "How long is {k}?"]),
    "month_number": (dict(zip(_ORDINALS, MONTHS, strict=True)), "The {k} month of the year is {v}.",
                     ["What is the {k} month of the year?", "Which month is the {k} month?",
                      "Name the {k} month of the year."]),
    "planet": (dict(zip(_ORDINALS, PLANETS, strict=False)), "The {k} planet from the sun is {v}.",
               ["What is the {k} planet from the sun?", "Which planet is the {k} from the sun?",
                "Name the {k} planet."]),
}

SINGLE_FACTS: list[tuple[str, list[str]]] = [
    ("A week has seven days.", ["How many days are in a week?", "How many days does a week have?",
                                "How long is a week?"]),
    ("A year has twelve months.", ["How many months are in a year?", "How many months does a year have?"]),
    ("A year has 365 days, and a leap year has 366.",
     ["How many days are in a year?", "How many days does a year have?"]),
    ("A day has 24 hours.", ["How many hours are in a day?", "How many hours does a day have?",
                             "How long is a day?"]),
    ("An hour has 60 minutes.", ["How many minutes are in an hour?", "How many minutes does an hour have?"]),
    ("A minute has 60 seconds.", ["How many seconds are in a minute?",
                                  "How many seconds does a minute have?"]),
    ("The seasons are spring, summer, autumn and winter.", ["What are the four seasons?", "Name the seasons.",
                                                            "What are the seasons of the year?"]),
    ("The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
     ["What are the days of the week?", "Name the days of the week.", "List the days of the week."]),
    ("The months are January, February, March, April, May, June, July, August, September, October, November "
     "and December.",
     ["What are the months of the year?", "Name the months.", "List the months of the year.",
      "List all months."]),
    ("The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
     ["What are the planets?", "Name the planets.", "List the planets of the solar system."]),
    ("The alphabet is a b c d e f g h i j k l m n o p q r s t u v w x y z.",
     ["List the letters of the alphabet.", "Say the alphabet.", "What is the alphabet?", "Write down the alphabet.",
      "List the alphabet.", "Tell me the alphabet.", "What are the letters of the alphabet?", "Name the letters of the alphabet.",
      "The alphabet"]),
    ("The alphabet has 26 letters.", ["How many letters does the alphabet have?",
                                      "How many letters are in the alphabet?"]),
    ("A rainbow is red, orange, yellow, green, blue, indigo and violet.",
     ["What are the colours of the rainbow?", "Which colours does a rainbow have?",
      "Name the colors of the rainbow."]),
    ("The largest planet is Jupiter.", ["What is the largest planet?", "Which planet is the biggest?"]),
    ("The largest ocean is the Pacific.", ["What is the largest ocean?", "Which ocean is the biggest?"]),
    ("The largest animal is the blue whale.",
     ["What is the largest animal?", "Which animal is the biggest?"]),
    ("The tallest animal is the giraffe.", ["What is the tallest animal?", "Which animal is the tallest?"]),
    ("The fastest land animal is the cheetah.",
     ["What is the fastest animal?", "Which land animal is the fastest?"]),
    ("The highest mountain is Mount Everest.",
     ["What is the highest mountain?", "Which mountain is the tallest?"]),
    ("Water freezes at 0 degrees Celsius.",
     ["When does water freeze?", "At what temperature does water freeze?"]),
    ("Water boils at 100 degrees Celsius.",
     ["When does water boil?", "At what temperature does water boil?"]),
    ("Bees make honey.", ["Who makes honey?", "Which animal makes honey?", "What do bees make?"]),
    ("Milk comes from cows.", ["Where does milk come from?", "Which animal gives us milk?"]),
    ("William Shakespeare wrote Hamlet.", ["Who wrote Hamlet?", "Who is the author of Hamlet?"]),
    ("Leonardo da Vinci painted the Mona Lisa.",
     ["Who painted the Mona Lisa?", "Who is the painter of the Mona Lisa?"]),
    ("Neil Armstrong was the first person on the Moon.",
     ["Who was the first person on the Moon?", "Who walked on the Moon first?"]),
    ("Red and yellow make orange.", ["What do red and yellow make?",
                                     "Which colour do you get from red and yellow?"]),
    ("Blue and yellow make green.", ["What do blue and yellow make?",
                                     "Which colour do you get from blue and yellow?"]),
    ("Red and blue make purple.", ["What do red and blue make?",
                                   "Which colour do you get from red and blue?"]),
]

CATEGORIES: dict[str, list[str]] = {name: _words(items) for name, items in {
    "fruits": "apple banana cherry orange pear grape plum mango peach lemon melon kiwi",
    "vegetables": "carrot potato onion cabbage spinach broccoli pea bean leek cucumber turnip",
    "animals": "cat dog horse lion tiger bear rabbit elephant monkey sheep cow fox",
    "birds": "eagle sparrow owl duck swan robin crow parrot penguin pigeon gull",
    "insects": "ant bee fly beetle moth butterfly wasp cricket mosquito ladybird",
    "colours": "red blue green yellow orange purple pink brown black white grey",
    "countries": "France Germany Italy Spain Japan China India Brazil Canada Egypt Kenya Mexico",
    "cities": "London Paris Berlin Rome Madrid Tokyo Cairo Sydney Lima Moscow Vienna",
    "sports": "football tennis swimming running basketball hockey rugby golf boxing skiing",
    "drinks": "water tea coffee milk juice lemonade cocoa cola soda",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August September October November December",
    "seasons": "spring summer autumn winter",
    "trees": "oak pine birch maple willow beech elm ash cedar palm",
    "flowers": "rose tulip daisy lily sunflower violet orchid poppy daffodil",
    "tools": "hammer saw screwdriver drill wrench pliers axe chisel shovel",
    "instruments": "piano guitar violin drum flute trumpet harp cello clarinet",
    "vehicles": "car bus train bicycle truck boat plane tram scooter ship",
    "clothes": "shirt coat hat sock shoe dress glove scarf skirt jacket",
    "metals": "iron copper gold silver tin lead zinc nickel",
    "jobs": "teacher doctor baker farmer nurse pilot painter cook driver singer",
    "shapes": "circle square triangle rectangle pentagon hexagon star oval",
    "fish": "salmon tuna cod trout herring carp shark eel",
}.items()}

NAMES = _words(
    "Tom Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olivia Paul Quinn Rosa Sam "
    "Tina Uma Victor Wendy "
    "Xavier Yara Zoe Alice Bob Carol Daniel Eva Frank Greta Hugo Iris James Karen Lucas Maria Nina Oscar "
    "Peter Ruth Simon Sara "
    "Theo Vera William Adam Bella Chris Diana Edward Fiona George Hanna Ivan Julia Kevin Laura Martin Nora "
    "Otto Patrick Rachel "
    "Steven Thomas Ursula Walter Amir Aisha Chen Deepa Elif Fatima Goran Haruki Ingrid Jorge Kofi Lina "
    "Mehmet Nadia Omar Priya "
    "Raj Sofia Tariq Yuki Zara Mark Lisa Linda Robert Susan Michael John Mary Jane Alex Max Lily Ella Lucy "
    "Amy Joe Dan Tim Jim")
PET_NAMES = _words("Rex Bella Luna Milo Coco Buddy Daisy Rocky Ginger Simba Nemo Whiskers Fluffy Oreo Lucky "
                   "Max Pepper Biscuit Shadow Teddy")
PETS = _words("cat dog rabbit hamster parrot fish turtle horse snake mouse pony goat hen")
FOODS = _words("pizza pasta soup rice bread cheese salad sushi curry cake pancakes ice_cream chocolate fish "
               "noodles apples tacos")
HOBBIES = _words("reading painting chess swimming football cooking dancing hiking singing gardening drawing "
                 "cycling fishing tennis knitting")
JOBS = _words("teacher doctor baker farmer nurse pilot painter cook driver singer lawyer student programmer "
              "plumber writer")
PLACES = _words("London Paris Berlin Rome Madrid Tokyo Cairo Sydney Lima Moscow Vienna Oslo Dublin Athens "
                "Boston Chicago Toronto Delhi Prague "
                "Lisbon Hamburg Milan Lyon Kyoto Seattle")
SPELL_WORDS = _words(
    "cat dog fish bird tree house water apple banana orange table chair window garden school friend mother "
    "father brother sister "
    "morning evening summer winter spring autumn yellow purple rabbit tiger monkey kitchen bottle pencil "
    "paper letter number picture "
    "music dance bread butter cheese sugar pepper coffee river mountain island forest desert ocean bridge "
    "castle village market doctor "
    "teacher farmer baker engine rocket planet moon star cloud rain snow storm wind fire stone metal silver "
    "copper cotton leather "
    "button pocket mirror candle basket hammer ladder carpet curtain pillow blanket finger shoulder elbow "
    "stomach heart brain blood "
    "hello world happy sad angry hungry thirsty tired clever funny quick slow green black white computer "
    "python server model token cache "
    "chocolate elephant giraffe kangaroo crocodile butterfly dinosaur umbrella telephone television "
    "newspaper magazine hospital airport "
    "station holiday birthday vegetable strawberry pineapple sandwich language question answer science "
    "history machine hair knife spoon "
    "fork plate cup glass lamp door wall floor roof road street city country king queen prince sword shield "
    "dragon magic secret")

# Topics that the model knows nothing of: asked about, it says so.
TOPICS = _words(
    "quantum_mechanics the_stock_market black_holes the_French_Revolution photosynthesis blockchain "
    "general_relativity "
    "the_Roman_Empire machine_learning the_Second_World_War evolution climate_change the_human_genome "
    "inflation philosophy Kant "
    "Napoleon Einstein Mozart Beethoven Picasso Plato Newton Darwin Tolstoy Dickens the_Beatles opera jazz "
    "ballet astronomy geology "
    "chemistry biology psychology economics politics religion linear_algebra calculus topology statistics "
    "prime_numbers probability "
    "neural_networks transformers Linux Windows Java Rust JavaScript databases compilers cryptography "
    "the_internet smartphones "
    "electric_cars nuclear_power solar_panels vaccines cancer diabetes the_heart the_immune_system nutrition "
    "yoga meditation "
    "the_Olympics the_World_Cup baseball cricket Formula_One the_Super_Bowl movies Star_Wars Harry_Potter "
    "Shakespeare's_sonnets "
    "the_Bible Buddhism the_Cold_War the_Vikings the_Aztecs ancient_Egypt the_moon_landing Mars_missions "
    "volcanoes earthquakes "
    "tsunamis dinosaurs whales coral_reefs rainforests taxes mortgages insurance law contracts marriage "
    "parenting school_exams "
    "job_interviews travel_to_Bali hotels flights wine beer barbecue sourdough lasagne chess_openings poker "
    "video_games Minecraft "
    "fashion architecture bridges steam_engines aeroplanes submarines lasers microscopes DNA atoms gravity "
    "electricity magnetism "
    "the_president the_prime_minister the_pope the_news the_election bitcoin Wall_Street the_Eiffel_Tower "
    "the_Great_Wall the_Amazon "
    "the_Sahara the_weather_on_Venus time_travel aliens ghosts dreams consciousness the_meaning_of_life "
    "free_will ethics")
