"""Words for passkeys, and ordinals to number them. The three sets of words are disjoint."""

# The spelling alphabet that the paper draws from.
NATO = tuple(
    (
        "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec "
        "romeo sierra tango uniform victor whiskey xray yankee zulu"
    ).split()
)

# Everyday words, for training small models: many more than the 26 of the alphabet.
COMMON = tuple(
    (
        "acorn apple arrow autumn bamboo banner barrel beacon bottle branch bridge bronze bucket cabin camera canyon "
        "carpet castle cherry circle cloud coffee comet cotton cradle crystal curtain daisy diamond dinner doctor "
        "dolphin donkey drawer eleven empire falcon fence fiddle finger flower fountain gallery gentle glacier grape "
        "gravel hallway harbor hazel helmet hockey hollow iron ivory jewel journey juniper kettle keyboard lantern "
        "laurel leather lobster magnet maple meadow melon mercury monkey mountain museum mustard nectar nickel "
        "notebook oasis ocean orchard otter oyster palace panther parrot pebble piano pigeon planet plum pocket "
        "pottery prairie puzzle quilt raven river rocket saffron sailor sandal satin scissors shadow shovel socket "
        "spider spiral squirrel statue sugar summer sunset tailor tempest thunder tiger timber tomato tower trumpet "
        "tulip tunnel velvet village violin volcano wagon walnut water whistle willow winter wizard wooden yogurt "
        "zebra"
    ).split()
)

# Words that are never used in training, only in evaluation.
HELD_OUT = tuple(
    (
        "anchor basket candle desert engine feather garden hammer island jacket kitchen ladder marble orange pencil "
        "quarter ribbon silver ticket umbrella valley window yellow button copper dragon eagle forest guitar honey "
        "insect jungle lemon mirror napkin onion pepper rabbit saddle turtle anvil badger cobalt dagger easel ferret "
        "goblet hermit inkwell jaguar kayak lagoon mantle noodle ostrich paddle quiver radish sickle tavern urchin "
        "vessel walrus yeoman zephyr bagpipe cactus dynamo eclipse fossil gazelle hyacinth igloo jasmine kimono "
        "lizard mitten nutmeg orchid pretzel quarry rhubarb sphinx teapot ukulele vulture wombat apricot buffalo "
        "cellar ditch ember flannel glove harp ivy jigsaw kitten locket moat nugget oar pigment quartz rudder sponge "
        "trowel vine wharf almond bishop cider dune elbow fjord gutter hamper icicle juggler knapsack"
    ).split()
)

ORDINALS = tuple(
    (
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
        "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
    ).split()
)
