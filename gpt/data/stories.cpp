#include "gpt/data/stories.h"

#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/data/tokenizer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace lns {
namespace {

struct Person {
    std::string_view name;
    bool she;
};

constexpr Person children[] = {{"Tom", false}, {"Ben", false}, {"Sam", false}, {"Max", false},
                               {"Leo", false}, {"Tim", false}, {"Dan", false}, {"Jack", false},
                               {"Mia", true},  {"Anna", true}, {"Lily", true}, {"Emma", true},
                               {"Rose", true}, {"Kate", true}, {"Zoe", true},  {"Sue", true}};
constexpr Person animals[] = {{"Fox", false},  {"Bear", false}, {"Frog", false}, {"Pig", false},
                              {"Dog", false},  {"Hen", true},   {"Cat", true},   {"Duck", true},
                              {"Mouse", true}, {"Rabbit", true}};
constexpr Person elders[] = {
    {"Mother", true}, {"Father", false}, {"Grandma", true}, {"Grandpa", false}};
constexpr Person owl = {"Owl", true};

struct Place {
    std::string_view name, at;
};

constexpr Place places[] = {{"garden", "in"}, {"kitchen", "in"}, {"park", "in"},  {"barn", "in"},
                            {"forest", "in"}, {"field", "in"},   {"beach", "at"}, {"farm", "at"},
                            {"market", "at"}, {"river", "by"},   {"pond", "by"},  {"well", "by"},
                            {"hill", "on"},   {"bridge", "on"}};

constexpr std::string_view toys[] = {"ball", "kite", "drum", "hat",  "cup",   "book",
                                     "key",  "doll", "boat", "bell", "spoon", "map",
                                     "lamp", "rope", "ring", "flute"};
constexpr std::string_view adjectives[] = {"red",   "blue", "green", "yellow", "black",
                                           "white", "old",  "new",   "big",    "little"};
constexpr int colours = 6; // the first adjectives

// Hiding places of toys (nooks) and of children (lairs).
constexpr std::string_view nooks[] = {"in the box",       "in the basket",   "in the drawer",
                                      "in the bag",       "in the pot",      "under the bed",
                                      "under the pillow", "on the shelf",    "behind the door",
                                      "under the table",  "behind the chair"};
constexpr std::string_view lairs[] = {"behind the door", "under the bed",   "behind the tree",
                                      "under the table", "behind the wall", "in the tall grass",
                                      "behind the bush", "in the barn",     "under the bridge"};

struct Kind {
    std::string one, many;
    bool food = false;
};

const Kind kinds[] = {
    {"apple", "apples", true},  {"egg", "eggs", true},       {"nut", "nuts", true},
    {"plum", "plums", true},    {"pear", "pears", true},     {"cake", "cakes", true},
    {"berry", "berries", true}, {"carrot", "carrots", true}, {"shell", "shells"},
    {"coin", "coins"},          {"stone", "stones"},         {"flower", "flowers"},
    {"leaf", "leaves"},         {"feather", "feathers"},     {"button", "buttons"}};

constexpr std::string_view numbers[] = {
    "no",       "one",     "two",     "three",     "four",     "five",     "six",
    "seven",    "eight",   "nine",    "ten",       "eleven",   "twelve",   "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"};

struct Toy {
    std::string_view adjective, noun;
};

// Values for the fields of a pattern: people a, b, c; toys x, y; places p, q; counts n, m; kinds
// k, l; words v, w.
struct Slots {
    int a = -1, b = -1, c = -1;
    int x = -1, y = -1;
    int p = -1, q = -1;
    int n = 0, m = 0;
    int k = 0, l = 1;
    std::string_view v = {}, w = {};
};

std::string_view article(std::string_view word) {
    return std::string_view("aeiou").find(word[0]) != word.npos ? "an " : "a ";
}

std::string counted(int n, const Kind& kind) {
    return std::string(numbers[n]) + " " + (n == 1 ? kind.one : kind.many);
}

// The world of one story and its text so far. Sentences are patterns with fields in braces; a
// pattern may have several sentences, separated by '|', and one that begins with '~' is used only
// if a and b are of different sexes.
//
//   {a}     as the subject: usually he or she if unambiguous, else the name
//   {a.o}   the same as the object (him, her); {a.n} always the name; {a.s} Tom's
//   {a.he} {a.him} {a.his}   always the pronoun, if a was named earlier in this sentence
//   {a.has} everything a has; {all} all names
//   {x} the ball, or it if unambiguous; {x.n} the ball; {x.a} a red ball; {x.noun} ball
//   {p} the garden, {p.in} in the garden
//   {n} three, {n.k} three apples, {n.more} three more apples, {n.was} was or were
//   {k} apples, {k.one} an apple
//
// Random numbers are drawn in the order of the text, never in two operands of one expression, whose
// order C++ does not specify.
struct Teller {
    uint64_t seed = 0, index = 0, drawn = 0;
    std::vector<Person> cast; // the last is the elder who asks, who is not in {all}
    std::vector<Toy> toys_here;
    bool full_names = false;                      // "the red ball", if two toys share a noun
    std::array<int, 4> holder = {-1, -1, -1, -1}; // of each toy; -1: nobody
    std::vector<Kind> kinds_here;
    std::string text;
    // Bit masks of the people and toys named in the previous sentence and so far in this one.
    uint32_t last = 0, now = 0, last_toys = 0, now_toys = 0;
    bool capital = true, quoted = false;
    bool dated = false; // the weather's sentence named a day

    int below(int n) { return int(random_below(uint32_t(n), seed, index, drawn++)); }
    int from(int low, int high) { return low + below(high - low + 1); }
    bool chance(int percent) { return below(100) < percent; }
    template <class T, size_t N> const T& pick(const T (&list)[N]) { return list[below(int(N))]; }
    std::string_view one_of(std::initializer_list<std::string_view> words) {
        return words.begin()[below(int(words.size()))];
    }
    int other(int a, int n) { // in 0 .. n-1, but not a
        int b = below(n - 1);
        return b + (b >= a);
    }
    // m distinct numbers in 0 .. n-1, in random order.
    std::vector<int> some(int m, int n) {
        std::vector<int> all(n);
        for (int i = 0; i < n; i++) all[i] = i;
        for (int i = 0; i < m; i++) std::swap(all[i], all[i + below(n - i)]);
        all.resize(m);
        return all;
    }

    int people() const { return int(cast.size()) - 1; }
    int elder() const { return people(); }

    void call(int n, bool only_children = false) {
        if (!only_children && chance(30)) {
            for (int i : some(n, std::size(animals))) cast.push_back(animals[i]);
            cast.push_back(owl);
        } else {
            for (int i : some(n, std::size(children))) cast.push_back(children[i]);
            cast.push_back(pick(elders));
        }
    }
    void bring_toys(int n) {
        for (int i : some(n, std::size(toys))) toys_here.push_back({pick(adjectives), toys[i]});
    }
    void bring_kinds(int n) {
        for (int i : some(n, std::size(kinds))) kinds_here.push_back(kinds[i]);
    }

    void put(std::string_view words) {
        if (words.empty()) return;
        text += words;
        if (capital && words[0] >= 'a' && words[0] <= 'z')
            text[text.size() - words.size()] += 'A' - 'a';
        capital = false;
    }

    uint32_t alike(int a) const {
        uint32_t mask = 0;
        for (size_t i = 0; i < cast.size(); i++)
            if (cast[i].she == cast[a].she) mask |= 1u << i;
        return mask;
    }

    void put_person(int a, std::string_view form) {
        uint32_t bit = 1u << a, same = alike(a);
        bool again = form == "he" || form == "him" || form == "his";
        bool clear = again ? (now & same) == bit : ((now | last) & same) == bit;
        bool pronoun = clear && (again || ((form.empty() || form == "o") && chance(80)));
        bool she = cast[a].she;
        now |= bit;
        if (!pronoun) {
            put(cast[a].name);
            if (form == "s" || form == "his") put("'s");
        } else if (form.empty() || form == "he") {
            put(she ? "she" : "he");
        } else {
            put(she ? "her" : form == "his" ? "his" : "him");
        }
    }

    void put_list(const std::vector<std::string>& list) {
        for (size_t i = 0; i < list.size(); i++) {
            if (i) put(i + 1 == list.size() ? " and " : ", ");
            put(list[i]);
        }
    }

    std::string the(int x) const {
        const Toy& toy = toys_here[x];
        std::string words = "the ";
        if (full_names) words += std::string(toy.adjective) + " ";
        return words += toy.noun;
    }

    void put_held(int a) {
        std::vector<std::string> list;
        for (size_t x = 0; x < toys_here.size(); x++)
            if (holder[x] == a) list.push_back(the(int(x))), now_toys |= 1u << x;
        if (list.empty()) list = {"nothing"};
        put_list(list);
    }

    void put_toy(int x, std::string_view form) {
        const Toy& toy = toys_here[x];
        uint32_t bit = 1u << x;
        bool it = form.empty() && (now_toys | last_toys) == bit && chance(60);
        now_toys |= bit;
        if (it) {
            put("it");
        } else if (form == "a") {
            put(article(toy.adjective));
            put(toy.adjective);
            put(" ");
            put(toy.noun);
        } else if (form == "noun") {
            put(toy.noun);
        } else if (form == "title") {
            put("the ");
            put(toy.adjective);
            put(" ");
            put(toy.noun);
        } else {
            put(the(x));
        }
    }

    void put_count(int n, std::string_view form, const Slots& s) {
        if (form == "k") {
            put(counted(n, kinds_here[s.k]));
        } else if (form == "l") {
            put(counted(n, kinds_here[s.l]));
        } else if (form == "more") {
            put(numbers[n]);
            put(" more ");
            put(n == 1 ? kinds_here[s.k].one : kinds_here[s.k].many);
        } else if (form == "was") {
            put(n == 1 ? "was" : "were");
        } else if (form == "is") {
            put(n == 1 ? "is" : "are");
        } else {
            put(n == 0 ? "none" : numbers[n]);
        }
    }

    void put_field(std::string_view field, const Slots& s) {
        std::string_view form = field.size() > 2 && field[1] == '.' ? field.substr(2) : "";
        if (field == "all") {
            std::vector<std::string> names;
            for (int i = 0; i < people(); i++) names.emplace_back(cast[i].name), now |= 1u << i;
            return put_list(names);
        }
        switch (field[0]) {
        case 'a':
        case 'b':
        case 'c': {
            int person = field[0] == 'a' ? s.a : field[0] == 'b' ? s.b : s.c;
            return form == "has" ? put_held(person) : put_person(person, form);
        }
        case 'e':
            return put_person(elder(), form);
        case 'x':
            return put_toy(s.x, form);
        case 'y':
            return put_toy(s.y, form);
        case 'p':
        case 'q': {
            const Place& place = places[field[0] == 'p' ? s.p : s.q];
            if (form == "in") put(place.at), put(" ");
            put("the ");
            return put(place.name);
        }
        case 'n':
            return put_count(s.n, form, s);
        case 'm':
            return put_count(s.m, form, s);
        case 'k':
        case 'l': {
            const Kind& kind = kinds_here[field[0] == 'k' ? s.k : s.l];
            if (form == "one") put(article(kind.one));
            return put(form == "one" ? kind.one : kind.many);
        }
        case 'v':
            return put(s.v);
        case 'w':
            return put(s.w);
        }
    }

    void new_sentence() {
        last = now, last_toys = now_toys;
        now = now_toys = 0;
        capital = true, quoted = false;
    }

    void write(std::string_view pattern, const Slots& s) {
        for (size_t i = 0; i < pattern.size(); i++) {
            char c = pattern[i];
            if (c == '{') {
                size_t end = pattern.find('}', i);
                put_field(pattern.substr(i + 1, end - i - 1), s);
                i = end;
            } else if (c == '|') {
                new_sentence();
                text += ' ';
            } else if (c == '"') {
                quoted = !quoted;
                text += c;
                capital = quoted;
            } else {
                put(pattern.substr(i, 1));
            }
        }
    }

    // Appends one of the patterns as the next sentence.
    void say(std::initializer_list<std::string_view> patterns, const Slots& s = {}) {
        size_t i = size_t(below(int(patterns.size())));
        bool mixed = s.a >= 0 && s.b >= 0 && cast[s.a].she != cast[s.b].she;
        while (patterns.begin()[i][0] == '~' && !mixed) i = (i + 1) % patterns.size();
        std::string_view pattern = patterns.begin()[i];
        if (pattern[0] == '~') pattern.remove_prefix(1);
        if (!text.empty() && text.back() != '\n') text += ' ';
        write(pattern, s);
        new_sentence();
    }

    void paragraph() {
        if (text.back() != '\n') text += "\n\n";
        last = last_toys = 0;
    }

    void title(std::initializer_list<std::string_view> patterns, const Slots& s = {}) {
        say(patterns, s);
        for (size_t i = 1; i < text.size(); i++) {
            std::string_view rest = std::string_view(text).substr(i);
            bool small = rest.starts_with("and ") || rest.starts_with("the ") ||
                         rest.starts_with("in ") || rest.starts_with("of ") ||
                         rest.starts_with("for ") || rest.starts_with("to ");
            if (text[i - 1] == ' ' && !small && text[i] >= 'a' && text[i] <= 'z')
                text[i] += 'A' - 'a';
        }
        paragraph();
    }

    void weather() {
        struct Day {
            std::string_view how, sign;
        };
        static constexpr Day days[] = {{"sunny", "the sky was blue"}, {"warm", "the bees hummed"},
                                       {"cold", "the wind blew"},     {"windy", "the trees shook"},
                                       {"rainy", "the sky was grey"}, {"quiet", "a bird sang"}};
        dated = chance(45);
        if (!dated) return;
        Slots s = {.v = pick(days).how};
        for (const Day& day : days)
            if (day.how == s.v) s.w = day.sign;
        std::string when(one_of({"day", "morning", "afternoon", "evening"}));
        say({"It was a {v} " + when + ".", "One {v} " + when + ", {w}.",
             "It was a {v} " + when + ", and {w}."},
            s);
    }

    void meet(int p) {
        std::string_view one_day = dated ? "" : "One day, ";
        say({"{all} were {p.in}.", "{v}{all} met {p.in}.", "{all} played {p.in}.",
             "{v}{all} went to {p}."},
            {.p = p, .v = one_day});
    }

    // A question and its answer, without punctuation. `about`: a bit mask of the people the answer
    // is about, who do not give it.
    void ask(std::string_view question, std::string_view answer, const Slots& s, uint32_t about) {
        paragraph();
        uint32_t others = ((1u << people()) - 1) & ~about;
        std::string pattern;
        Slots slots = s;
        if (others && chance(45)) {
            int i = below(std::popcount(others));
            for (; i > 0; i--) others &= others - 1;
            slots.c = std::countr_zero(others);
            pattern = cat_words({"\"", question, "?\" asked {e.n}.|\"", answer, ",\" said {c.n}."});
        } else {
            pattern = cat_words({question, "?|", answer, "."});
        }
        say({pattern}, slots);
    }
    static std::string cat_words(std::initializer_list<std::string_view> parts) {
        std::string all;
        for (std::string_view part : parts) all += part;
        return all;
    }

    void happy_end() {
        if (chance(70)) return;
        paragraph();
        say({"It was a good day.", "Then it was time to go home.", "They all laughed.",
             "Everyone was happy.", "Then the sun went down, and they went home."});
    }
};

// Toys go from hand to hand.
void passing(Teller& t) {
    t.call(t.from(2, 4));
    int people = t.people(), toys = t.from(1, 3);
    t.bring_toys(toys);
    std::array<int, 4> first = {}, giver = {-1, -1, -1, -1};
    std::array<std::string_view, 4> lies = {}; // places of toys without a holder
    for (int x = 0; x < toys; x++) first[x] = t.holder[x] = t.below(people);
    int p = t.below(std::size(places));

    t.title({"{a.n} and {x.title}", "{x.title}", "Who Has {x.title}"}, {.a = t.holder[0], .x = 0});
    t.weather();
    t.meet(p);
    for (int x = 0; x < toys; x++)
        if (x > 0 && std::find(&first[0], &first[x], first[x]) != &first[x])
            t.say({"{a} also had {x.a}."}, {.a = first[x], .x = x});
        else
            t.say({"{a.n} had {x.a}.", "{a.n} held {x.a}.", "{a.n} brought {x.a}."},
                  {.a = first[x], .x = x});
    t.paragraph();

    int events = t.from(3, 6);
    for (int event = 0; event < events; event++) {
        int x = t.below(toys), a = t.holder[x];
        if (a < 0) {
            int b = t.below(people);
            t.say({"{b} picked up {x.n}.", "{b} saw {x.n} {w} and took it.",
                   "Soon {b} found {x.n} {w}.", "{b} ran to {x.n} and picked it up."},
                  {.b = b, .x = x, .w = lies[x]});
            t.holder[x] = b;
            continue;
        }
        int b = t.other(a, people), what = t.below(100), y = t.below(toys);
        if (b == giver[x]) b = t.other(a, people); // rarely straight back
        giver[x] = a;
        Slots s = {.a = a, .b = b, .x = x, .y = y};
        if (what < 20 && t.holder[y] == b) {
            t.say({"{a} gave {x.n} to {b.o} and got {y.n} back.",
                   "{a} and {b.n} swapped, so now {a.n} had {y.n} and {b.n} had {x.n}.",
                   "{a} gave {b.o} {x.n} for {y.n}."},
                  s);
            t.holder[x] = b, t.holder[y] = a;
        } else if (what < 55) {
            t.say({"{a} gave {x} to {b.o}.", "{a} gave {b.o} {x.n}.", "{a} passed {x} to {b.o}.",
                   "{a} handed {x} to {b.o}.", "Then {a} gave {x} to {b.o}.",
                   "{a} was tired of {x.n} and gave it to {b.o}.",
                   "~{b} wanted {x.n}, so {a.n} gave it to {b.him}."},
                  s);
            t.holder[x] = b;
            if (t.chance(25))
                t.say({"\"Thank you, {a.n},\" said {b.n}.", "{b} smiled at {a.o}.",
                       "\"Thank you,\" said {b.n}."},
                      s);
        } else if (what < 70) {
            t.say({"\"May I have {x.n}?\" asked {b.n}.|\"Yes,\" said {a.n}, and {b.n} took it.",
                   "{b} asked {a.o} for {x.n}.|{a.n} gave it to {b.o}.",
                   "~\"Please give me {x.n},\" said {b.n}.|So {a.n} gave it to {b.o}.",
                   "\"Can I play with {x.n}?\" asked {b.n}.|\"You can have it,\" said {a.n}."},
                  s);
            t.holder[x] = b;
        } else if (what < 80) {
            t.say({"{b} took {x} from {a.o}.", "Then {b} took {x} from {a.o}."}, s);
            t.holder[x] = b;
        } else if (what < 90) {
            t.say({"{b} wanted {x.n}.|\"No, it is mine,\" said {a.n}.",
                   "{b} asked for {x.n}, but {a.n} kept it.",
                   "\"May I have {x.n}?\" asked {b.n}.|\"No,\" said {a.n}, and {a.he} kept it."},
                  s);
        } else if (event + 1 < events) {
            s.w = lies[x] = t.one_of({"on the grass", "on the ground", "by the tree"});
            t.say({"{a} put {x} {w}.", "{a} left {x} {w}.", "{a} dropped {x} {w}."}, s);
            t.holder[x] = -1;
            if (t.chance(50)) t.say({"Now no one had {x.n}.", "No one saw it."}, s);
        }
        if (t.chance(25))
            t.say({"Now {a} had {a.has}.", "{a} had {a.has} now."}, {.a = t.below(people)});
    }

    int x = t.below(toys), a = t.holder[x], r = t.below(people);
    if (a >= 0)
        t.ask("Who has {x.n} now", "{a.n} has {x.n}", {.a = a, .x = x}, 1u << a);
    else
        t.ask("Who has {x.n} now", "No one has {x.n}", {.x = x}, 0);
    if (t.chance(35)) {
        t.ask("Who had {x.n} first", "{a.n} had it first", {.a = first[x], .x = x}, 1u << first[x]);
    } else if (t.chance(50)) {
        t.ask("What does {a.n} have now", "{a.n} has {a.has}", {.a = r}, 1u << r);
    }
}

// Things are eaten, found, lost and given.
void counting(Teller& t) {
    t.call(t.from(1, 3));
    t.bring_kinds(1);
    int people = t.people(), p = t.below(std::size(places)), q = t.other(p, std::size(places));
    std::array<int, 4> count = {};
    t.title({"{a.s} {k}", "{a.n} and the {k}", "How Many {k}", "The {k}"}, {.a = 0});
    t.weather();
    for (int a = 0; a < people; a++) {
        count[a] = t.from(a == 0 ? 3 : 1, 9);
        t.say({"{a.n} had {n.k}.", "{a.n} found {n.k} {p.in}.", "{a.n} had a bag with {n.k}.",
               "{e.n} gave {a.n} {n.k}."},
              {.a = a, .p = p, .n = count[a]});
    }
    t.paragraph();

    int events = t.from(3, 5);
    for (int event = 0; event < events; event++) {
        int a = t.below(people), what = t.below(100), m;
        Slots s = {.a = a, .p = p, .q = q};
        bool less = true;
        if (count[a] == 0 || (what < 25 && count[a] < 11)) {
            s.m = m = t.from(1, 5);
            t.say({"{a} found {m.more} {q.in}.", "{a} found {m.more}.",
                   "{a} got {m.more} from {e.n}.", "Then {a} found {m.more}.",
                   "{e.n} gave {a.o} {m.more}."},
                  s);
            count[a] += m, less = false;
        } else if (what < 60 && people > 1) {
            int b = s.b = t.other(a, people);
            s.m = m = t.from(1, std::min(count[a], 5));
            if (count[b] + m > 20) continue;
            t.say({"{a} gave {m.k} to {b.o}.", "{a} gave {b.o} {m.k}.",
                   "{b} was sad, so {a.n} gave {b.o} {m.k}.", "Then {a} gave {m.k} to {b.o}.",
                   "\"Here, {b.n},\" said {a.n}, and gave {b.o} {m.k}."},
                  s);
            count[a] -= m, count[b] += m;
            if (t.chance(40)) {
                s.n = count[a], s.m = count[b];
                t.say({"Now {a} had {n.k}, and {b} had {m}.", "{a} had {n} now, and {b} had {m}."},
                      s);
                continue;
            }
        } else if (t.kinds_here[0].food && what < 85) {
            s.m = m = t.from(1, std::min(count[a], 4));
            t.say({"{a} ate {m.k}.", "{a} was hungry and ate {m.k}.", "Then {a} ate {m.k}.",
                   "{a} sat down and ate {m} of {a.his} {k}."},
                  s);
            count[a] -= m;
        } else {
            s.m = m = t.from(1, std::min(count[a], 4));
            t.say({"{a} lost {m.k} {q.in}.", "A bird took {m.k} from {a.o}.", "{a} lost {m.k}.",
                   "{a} dropped {m.k} into the river."},
                  s);
            count[a] -= m;
        }
        s.n = count[a];
        if (!t.chance(60)) continue;
        if (less)
            t.say({"Now {a} had {n.k}.", "{a} had {n.k} left.", "That left {a.o} with {n.k}.",
                   "\"I have {n.k} left,\" said {a.n}."},
                  s);
        else
            t.say({"Now {a} had {n.k}.", "{a} had {n.k} now.", "\"Now I have {n.k},\" said {a.n}."},
                  s);
    }

    int a = t.below(people), b = people > 1 ? t.other(a, people) : a;
    t.ask("How many {k} does {a.n} have now", "{a.n} has {n.k}", {.a = a, .n = count[a]}, 1u << a);
    if (people > 1 && count[a] + count[b] <= 20 && t.chance(50))
        t.ask("How many {k} do {a.n} and {b.n} have together", "They have {n.k}",
              {.a = a, .b = b, .n = count[a] + count[b]}, 1u << a | 1u << b);
    else
        t.happy_end();
}

// Two traders with two kinds of goods.
void trading(Teller& t) {
    t.call(2);
    t.bring_kinds(2);
    int p = t.below(std::size(places));
    int has[2][2] = {{t.from(4, 10), 0}, {0, t.from(4, 10)}}; // by trader and kind
    t.title({"The Trade", "{k} for {l}", "{a.n} and {b.n}"}, {.a = 0, .b = 1});
    t.weather();
    t.say({"{a.n} had {n.k}, and {b.n} had {m.l}.", "{a.n} had {n.k}.|{b.n} had {m.l}."},
          {.a = 0, .b = 1, .n = has[0][0], .m = has[1][1]});
    t.say({"They met {p.in}.", t.dated ? "They both went to {p}." : "One day, they met {p.in}."},
          {.p = p});
    t.paragraph();
    int deals = t.from(1, 2);
    for (int deal = 0; deal < deals; deal++) {
        int a = t.below(2), b = 1 - a;
        if (has[a][a] == 0 || has[b][b] == 0) break;
        int n = t.from(1, std::min(4, has[a][a])), m = t.from(1, std::min(4, has[b][b]));
        Slots s = {.a = a, .b = b, .n = n, .m = m, .k = a, .l = b};
        t.say({"\"I will give you {n.k} for {m.l},\" said {a.n}.",
               "\"Give me {m.l}, and I will give you {n.k},\" said {a.n}."},
              s);
        if (t.chance(20)) {
            t.say({"\"No,\" said {b.n}, and they did not trade.",
                   "\"No, thank you,\" said {b.n}, and {b.he} kept the {l}."},
                  s);
            continue;
        }
        if (t.chance(50))
            t.say({"\"Yes,\" said {b.n}.", "{b.n} was glad.", "\"Good,\" said {b.n}."}, s);
        t.say({"So {a.n} gave {n.k} to {b.n}, and {b.n} gave {m.l} to {a.n}.",
               "~So {a.n} gave {b.n} {n.k}, and {b.he} gave {a.him} {m.l}.",
               "They traded {n.k} for {m.l}."},
              s);
        has[a][a] -= n, has[b][a] += n, has[b][b] -= m, has[a][b] += m;
        int r = t.below(2);
        if (t.chance(70))
            t.say({"Now {a.n} had {n.k} and {m.l}.", "{a.n} had {n.k} and {m.l} now."},
                  {.a = r, .n = has[r][0], .m = has[r][1]});
    }
    int a = t.below(2), k = t.below(2);
    t.ask("How many {k} does {a.n} have now", "{a.n} has {n.k}", {.a = a, .n = has[a][k], .k = k},
          1u << a);
    if (t.chance(60))
        t.ask("And how many {k} does {a.n} have", "{a.n} has {n.k}",
              {.a = 1 - a, .n = has[1 - a][k], .k = k}, 1u << (1 - a));
}

// Things of two colours go in and out of a box.
void boxes(Teller& t) {
    t.call(t.from(1, 3));
    int people = t.people();
    std::vector<int> colour = t.some(2, colours);
    std::string noun(t.one_of({"ball", "block", "bead", "ribbon", "bean"}));
    for (int c : colour) {
        std::string one = std::string(adjectives[c]) + " " + noun;
        t.kinds_here.push_back({one, one + "s"});
    }
    int count[2] = {t.from(2, 8), t.from(2, 8)};
    std::string_view box = t.one_of({"box", "basket", "bag", "jar"});
    t.title({"The {w}", "The {k}", "{a.n} and the {w}"}, {.a = 0, .w = box});
    t.weather();
    t.say({"There {n.was} {n.k} and {m.l} in the {w}.", "{a.n} put {n.k} and {m.l} in the {w}."},
          {.a = 0, .n = count[0], .m = count[1], .w = box});
    int events = t.from(3, 5);
    for (int event = 0; event < events; event++) {
        int a = t.below(people), k = t.below(2), in = t.chance(45) && count[k] < 12;
        if (count[k] == 0) in = true;
        int n = in ? t.from(1, 5) : t.from(1, std::min(4, count[k]));
        Slots s = {.a = a, .n = n, .k = k, .l = 1 - k, .w = box};
        if (in)
            t.say({"{a} put {n.more} in the {w}.", "Then {a} put in {n.k}.", "{a} put in {n.k}."},
                  s);
        else
            t.say({"{a} took out {n.k}.", "Then {a} took out {n.k}.",
                   "{a} took {n.k} out of the {w}."},
                  s);
        count[k] += in ? n : -n;
        s.n = count[k];
        if (t.chance(50))
            t.say({"Now there {n.was} {n.k} in the {w}.", "That made {n.k} in the {w}."}, s);
    }
    int k = t.below(2);
    t.ask("How many {k} are in the {w} now", "There {n.is} {n.k} in the {w}",
          {.n = count[k], .k = k, .w = box}, 0);
    if (t.chance(50))
        t.ask("Are there more {k} than {l}",
              count[k] > count[1 - k]    ? "Yes, there are more {k}"
              : count[k] == count[1 - k] ? "No, there are as many {l} as {k}"
                                         : "No, there are more {l}",
              {.k = k, .l = 1 - k}, 0);
}

// People walk from place to place and carry toys.
void walking(Teller& t) {
    t.call(t.from(2, 3));
    int people = t.people(), toys = t.from(1, 2);
    t.bring_toys(toys);
    std::vector<int> around = t.some(4, std::size(places));
    std::array<int, 4> at = {}, before = {-1, -1, -1, -1}, lies = {};
    t.title({"{a.n} and {x.title}", "{p} and {q}", "Where Is {a.n}", "Where Is {x.title}"},
            {.a = 0, .x = 0, .p = around[0], .q = around[1]});
    t.weather();
    for (int a = 0; a < people; a++) {
        at[a] = around[t.below(4)];
        t.say({"{a.n} was {p.in}."}, {.a = a, .p = at[a]});
    }
    for (int x = 0; x < toys; x++) {
        lies[x] = at[t.below(people)];
        t.say({"There was {x.a} {p.in}.", "{x.a} lay {p.in}."}, {.x = x, .p = lies[x]});
    }
    t.paragraph();

    int events = t.from(4, 7);
    for (int event = 0; event < events; event++) {
        int a = t.below(people), x = t.below(toys);
        Slots s = {.a = a, .x = x, .p = at[a]};
        if (t.holder[x] < 0 && lies[x] == at[a] && t.chance(75)) {
            t.say({"{a} picked up {x}.", "{a} took {x}.", "{a} saw {x} and picked it up."}, s);
            t.holder[x] = a;
        } else if (t.holder[x] == a && before[a] != -1 && t.chance(40)) {
            t.say({"{a} put down {x.n} {p.in}.", "{a} left {x} {p.in}.", "{a} put {x} down."}, s);
            t.holder[x] = -1, lies[x] = at[a];
        } else {
            int to = around[t.below(4)];
            if (to == at[a]) to = around[t.below(4)];
            if (to == at[a]) continue;
            s.q = to;
            bool carries = t.holder[x] == a;
            if (carries)
                t.say({"{a} took {x} to {q}.", "{a} went to {q} with {x.n}.",
                       "{a} carried {x} to {q}."},
                      s);
            else
                t.say({"{a} went to {q}.", "{a} walked to {q}.", "Then {a} went to {q}.",
                       "{a} ran from {p} to {q}."},
                      s);
            before[a] = at[a], at[a] = to;
            int b = t.other(a, people);
            if (at[b] == to && t.chance(80))
                t.say({"{b.n} was there too.", "There {a} met {b.n}.",
                       "\"Hello, {a.n},\" said {b.n}."},
                      {.a = a, .b = b});
            else if (at[b] != to && people == 2 && t.chance(20))
                t.say({"No one was there.", "No one else was {p.in}."}, {.p = to});
        }
    }
    int a = t.below(people), x = t.below(toys);
    t.ask("Where is {a.n} now", "{a.n} is {p.in}", {.a = a, .p = at[a]}, 1u << a);
    if (before[a] >= 0 && t.chance(40)) {
        t.ask("Where was {a.n} before that", "{a.n} was {p.in}", {.a = a, .p = before[a]}, 1u << a);
        if (t.chance(50)) return;
    }
    t.ask("Where is {x.n}", t.holder[x] < 0 ? "{x.n} is {p.in}" : "{a.n} has it {p.in}",
          {.a = t.holder[x], .x = x, .p = t.holder[x] < 0 ? lies[x] : at[t.holder[x]]},
          t.holder[x] < 0 ? 0 : 1u << t.holder[x]);
}

// A toy is put away, and moved while its owner is absent.
void hiding(Teller& t) {
    t.call(t.from(2, 3));
    int people = t.people();
    t.bring_toys(1);
    std::vector<int> nook = t.some(4, std::size(nooks));
    int moves = people - 1, p = t.below(std::size(places));
    t.title({"{a.n} and {x.title}", "The Lost {x.noun}", "Where Is {x.title}", "{a.s} {x.noun}"},
            {.a = 0, .x = 0});
    t.weather();
    Slots s = {.a = 0, .b = 1, .x = 0, .p = p, .v = nooks[nook[1]], .w = nooks[nook[0]]};
    t.say({"{a.n} had {x.a}.", "{e.n} gave {a.n} {x.a}.", "{a.n} got {x.a} from {e.n}."}, s);
    t.say({"{a} put {x} {w} and went to {p}.", "{a} put {x} {w}.|Then {a} went to {p}.",
           "{a} hid {x} {w}.|Then {a} went out to play."},
          s);
    t.paragraph();
    for (int move = 0; move < moves; move++) {
        Slots m = {
            .a = 0, .b = 1 + move, .x = 0, .v = nooks[nook[move + 1]], .w = nooks[nook[move]]};
        if (move == 0)
            t.say({"While {a.n} was away, {b.n} found {x.n} {w} and put it {v}.",
                   "{b.n} came and took {x.n}.|{b} put it {v}.",
                   "{b.n} looked {w} and saw {x.n}.|{b} put it {v}."},
                  m);
        else
            t.say({"Later, {b.n} found it and put it {v}.", "Then {b.n} took {x.n} and put it {v}.",
                   "After that, {b.n} saw {x.n} {w} and put it {v}."},
                  m);
    }
    t.paragraph();
    t.say({"{a.n} came back.", "Soon {a.n} came home.", "Then {a.n} came back for {x.n}."}, s);
    t.say({"{a} looked {w}, but {x.n} was not there.", "{a} looked {w}.|{x.n} was not there.",
           "{a} wanted {x.n} and looked {w}, but it was gone."},
          s);
    for (int move = 0; move < moves; move++) {
        Slots m = {
            .a = 0, .b = 1 + move, .x = 0, .v = nooks[nook[move + 1]], .w = nooks[nook[move]]};
        if (move + 1 == moves) {
            t.say({"\"Where is {x.n}?\" asked {a.n}.|\"It is {v},\" said {b.n}.",
                   "\"Did you see {x.n}?\" asked {a.n}.|\"Look {v},\" said {b.n}.",
                   "\"I put it {v},\" said {b.n}."},
                  m);
            t.say({"{a.n} looked {v} and found {x.n}.", "So {a.n} looked {v}, and there it was."},
                  m);
        } else {
            t.say({"\"I put it {v},\" said {b.n}.", "\"It is {v},\" said {b.n}."}, m);
            t.say({"{a.n} looked {v}, but it was not there.", "But it was not {v}."}, m);
        }
    }
    int question = t.below(3);
    if (question == 0)
        t.ask("Where was {x.n} first", "{x.n} was {w}", s, 0);
    else if (question == 1)
        t.ask("Who put {x.n} {v}", "{b.n} put it {v}", s, 1u << 1);
    else
        t.ask("Where did {a.n} find {x.n}", "{a.n} found it {w}",
              {.a = 0, .x = 0, .w = nooks[nook[moves]]}, 1u << 0);
}

// Hide and seek.
void seeking(Teller& t) {
    t.call(t.from(3, 4));
    int people = t.people();
    std::vector<int> lair =
        t.some(people + 1, std::size(lairs)); // hider i's; the first and the last are empty
    t.title({"Hide and Seek", "Where Is {b.n}", "{a.n} Counts to Ten"}, {.a = 0, .b = 1});
    t.weather();
    t.say({"{all} played hide and seek.", t.dated ? "{all} wanted to play hide and seek."
                                                  : "One day, {all} played hide and seek."});
    t.say({"{a.n} counted to ten.", "{a.n} closed {a.his} eyes and counted to ten."}, {.a = 0});
    for (int b = 1; b < people; b++)
        t.say({"{b.n} hid {w}.", "{b.n} ran and hid {w}."}, {.b = b, .w = lairs[lair[b]]});
    t.paragraph();
    int left = people - 1, final = -1, found = 0;
    bool first = true;
    for (int i : t.some(people + 1, people + 1)) {
        if (left == 0) break;
        std::string_view word = first ? "First" : left == 1 ? "At last" : "Then";
        first = false;
        Slots s = {.a = 0, .b = i, .n = left - 1, .v = word, .w = lairs[lair[i]]};
        if (i == 0 || i == people) {
            t.say({"{a} looked {w}, but no one was there.", "{a} looked {w}.|No one was there."},
                  s);
            continue;
        }
        t.say({"{a} looked {w} and found {b.n}.", "{v}, {a} found {b.n} {w}.",
               "{a} looked {w}.|There was {b.n}."},
              s);
        final = i, left--;
        found |= 1 << i;
        if (left == 1 && t.chance(50)) {
            int b = 1;
            while (found >> b & 1) b++;
            t.say({"Now only {b.n} was still hiding.",
                   "\"Now I only have to find {b.n},\" said {a.n}."},
                  {.a = 0, .b = b});
        } else if (left == 2 && t.chance(50)) {
            t.say({"Now two were still hiding."});
        }
    }
    int b = t.from(1, people - 1), question = t.below(3);
    if (question == 0)
        t.ask("Where did {a.n} hide", "{a.n} hid {w}", {.a = b, .w = lairs[lair[b]]}, 1u << b);
    else if (question == 1)
        t.ask("Who hid {w}", "{a.n} hid {w}", {.a = b, .w = lairs[lair[b]]}, 1u << b);
    else
        t.ask("Who was found last", "{a.n} was found last", {.a = final}, 1u << final);
}

// Who has more, twice.
void comparing(Teller& t) {
    t.call(t.from(2, 3));
    t.bring_kinds(1);
    int people = t.people(), p = t.below(std::size(places));
    std::array<int, 4> count = {};
    t.title({"Who Has More", "The Most {k}", "{a.n} and {b.n} Count"}, {.a = 0, .b = 1});
    t.weather();
    t.say({"{all} looked for {k} {p.in}.", "{all} went to {p} to find {k}."}, {.p = p});
    for (int a = 0; a < people; a++) {
        count[a] = t.from(1, 9);
        t.say({"{a.n} found {n.k}.", "{a.n} had {n.k}."}, {.a = a, .n = count[a]});
    }
    auto compare = [&](int a, int b) {
        if (count[a] < count[b]) std::swap(a, b);
        if (count[a] == count[b])
            t.say({"{a.n} and {b.n} had the same number.", "{a.n} had as many as {b.n}."},
                  {.a = a, .b = b});
        else
            t.say({"{a.n} had more than {b.n}.", "{b.n} had fewer than {a.n}.",
                   "\"I have more than you, {b.n},\" said {a.n}."},
                  {.a = a, .b = b});
    };
    compare(0, 1);
    t.paragraph();
    int events = t.from(1, 3);
    for (int event = 0; event < events; event++) {
        int a = t.below(people), b = t.other(a, people);
        if (t.chance(60) || count[a] < 2) {
            int m = t.from(1, 6);
            t.say({"Then {a} found {m.more}.", "{a} found {m.more} {p.in}."},
                  {.a = a, .p = p, .m = m});
            count[a] += m;
        } else {
            int m = t.from(1, std::min(3, count[a]));
            t.say({"{a} gave {m} to {b.o}.", "Then {a} gave {b.o} {m.k}."},
                  {.a = a, .b = b, .m = m});
            count[a] -= m, count[b] += m;
        }
        if (count[a] > 20 || count[b] > 20) break;
        if (t.chance(50)) t.say({"Now {a} had {n.k}."}, {.a = a, .n = count[a]});
        if (t.chance(60)) compare(a, b);
    }
    int most = 0, ties = 0;
    for (int a = 0; a < people; a++) most = count[a] > count[most] ? a : most;
    for (int a = 0; a < people; a++) ties += count[a] == count[most];
    std::string_view question = people == 2 ? "Who has more {k} now" : "Who has the most {k} now";
    if (ties == 1)
        t.ask(question, people == 2 ? "{a.n} has more" : "{a.n} has the most", {.a = most},
              1u << most);
    else
        t.happy_end();
    if (t.chance(40) || ties > 1) {
        int a = t.below(people);
        if (count[a] <= 20)
            t.ask("How many {k} does {a.n} have now", "{a.n} has {n.k}", {.a = a, .n = count[a]},
                  1u << a);
    }
}

// A chain of who is taller than whom, told in any order.
void ordering(Teller& t) {
    struct Scale {
        std::string_view plain, more, most, least, use;
    };
    static constexpr Scale scales[] = {
        {"tall", "taller", "tallest", "shortest",
         "An apple hung high in a tree.|Only the tallest could get it.|{a.n} got the apple."},
        {"old", "older", "oldest", "youngest",
         "There was one cake.|The oldest could cut it.|So {a.n} cut the cake."},
        {"fast", "faster", "fastest", "slowest",
         "They ran to the bridge.|{a.n} was there first, and {b.n} was there last."},
        {"strong", "stronger", "strongest", "weakest",
         "A big stone lay on the road.|Only the strongest could move it.|{a.n} moved the stone."}};
    t.call(t.from(3, 4));
    const Scale& scale = t.pick(scales);
    int people = t.people(), p = t.below(std::size(places));
    std::vector<int> order = t.some(people, people); // tallest first
    t.title({"Who Is the {w}", "The {w}"}, {.w = scale.most});
    t.weather();
    t.meet(p);
    for (int i : t.some(people - 1, people - 1)) {
        Slots s = {.a = order[i], .b = order[i + 1], .v = scale.plain, .w = scale.more};
        t.say({"{a.n} was {w} than {b.n}.", "{b.n} was not as {v} as {a.n}.",
               "\"I am {w} than {b.n},\" said {a.n}."},
              s);
    }
    Slots ends = {.a = order[0], .b = order[people - 1]};
    if (t.chance(60)) {
        t.paragraph();
        t.say({scale.use}, ends);
    }
    ends.v = scale.least, ends.w = scale.most;
    if (t.chance(50))
        t.ask("Who was the {w}", "{a.n} was the {w}", ends, 1u << ends.a);
    else
        t.ask("Who was the {v}", "{b.n} was the {v}", ends, 1u << ends.b);
    if (t.chance(50)) {
        std::vector<int> pair = t.some(2, people);
        int i = std::min(pair[0], pair[1]), j = std::max(pair[0], pair[1]);
        bool yes = t.chance(50);
        t.ask(yes ? "Was {a.n} {w} than {b.n}" : "Was {b.n} {w} than {a.n}",
              yes ? "Yes, {a.n} was {w}" : "No, {a.n} was {w}",
              {.a = order[i], .b = order[j], .w = scale.more}, 1u << order[i] | 1u << order[j]);
    }
}

// Whose is it? Things of one kind, a colour for each owner.
void owners(Teller& t) {
    t.call(t.from(2, 4));
    int people = t.people();
    std::string_view noun = t.one_of({"hat", "cup", "kite", "boat", "ball", "scarf", "spoon"});
    std::string_view box = t.one_of({"box", "basket", "bag"});
    t.full_names = true;
    for (int i : t.some(people, colours)) t.toys_here.push_back({adjectives[i], noun});
    t.kinds_here.push_back(
        {std::string(noun), noun == "scarf" ? "scarves" : std::string(noun) + "s"});
    t.title({"The {k}", "Whose {w} Is It", "The {v} of {k}"}, {.v = box, .w = noun});
    t.weather();
    for (int a = 0; a < people; a++) {
        t.say({"{a.n} had {x.a}.", "{a.n} made {x.a}.", "{e.n} gave {a.n} {x.a}."},
              {.a = a, .x = a});
        t.holder[a] = a;
    }
    t.say({"They put the {k} in a {w}.", "They put the {k} in a {w} and went out to play."},
          {.w = box});
    t.paragraph();
    std::vector<int> order = t.some(people, people);
    for (int i = 0; i < people; i++) {
        int a = order[i];
        Slots s = {.a = a, .x = a, .w = noun};
        bool only = i + 1 == people;
        if (only) {
            t.say({"Only one {w} was left, and it was {v}.", "The last {w} was {v}."},
                  {.v = t.toys_here[a].adjective, .w = noun});
        } else {
            t.say({i == 0 ? "Later, {e.n} took out {x.a}." : "Then {e.n} took out {x.a}."}, s);
            if (t.chance(40)) t.say({"\"Whose {w} is this?\" asked {e.n}."}, s);
        }
        t.say({"\"It is mine,\" said {a.n}.", "{e.n} gave it to {a.n}.", "It was {a.s} {w}.",
               "\"That is my {w},\" said {a.n}."},
              s);
    }
    int a = t.below(people);
    if (t.chance(50))
        t.ask("Who has {x.n} now", "{a.n} has {x.n}", {.a = a, .x = a}, 1u << a);
    else
        t.ask("What did {a.n} have", "{a.n} had {x.a}", {.a = a, .x = a}, 1u << a);
}

// To get one thing, first get another: the wishes are granted in reverse order.
void quest(Teller& t) {
    int depth = t.from(1, 3); // the number of others asked
    t.call(depth + 1);
    t.bring_toys(depth + 1);
    for (int i = 0; i < depth; i++) t.holder[i] = i + 1;
    t.holder[depth] = 0;
    t.title({"{a.n} and {x.title}", "{x.title}", "{a.s} Wish", "What {a.n} Wanted"},
            {.a = 0, .x = 0});
    t.weather();
    t.say({"{a.n} wanted {x.a}.", "More than anything, {a.n} wanted {x.a}."}, {.a = 0, .x = 0});
    for (int i = 0; i < depth; i++) {
        Slots s = {.a = 0, .b = i + 1, .x = i, .y = i + 1};
        t.say({i == 0 ? "{b.n} had one." : "So {a.n} went to {b.n}, who had {x.a}.",
               i == 0 ? "{a} went to {b.n}, who had one." : "{b.n} had {x.a}."},
              s);
        t.say({"\"Bring me {y.a}, and you can have {x.n},\" said {b.n}.",
               "\"I will give you {x.n} for {y.a},\" said {b.n}.",
               "\"First I want {y.a},\" said {b.n}."},
              s);
    }
    t.paragraph();
    t.say({"{a.n} had {x.a} at home.", "{a.n} looked at home and found {x.a}.", "{a.n} had {x.a}."},
          {.a = 0, .x = depth});
    for (int i = depth - 1; i >= 0; i--) {
        Slots s = {.a = 0, .b = i + 1, .x = i, .y = i + 1};
        t.say({"{a} gave {y.n} to {b.n} and got {x.n}.",
               "{a} took {y.n} to {b.n}.|{b.n} gave {a.o} {x.n}.",
               "{b.n} took {y.n} and gave {a.n} {x.n}."},
              s);
        t.holder[i] = 0, t.holder[i + 1] = i + 1;
    }
    t.say({"At last, {a} had {x.n}.", "Now {a} had {x.n}.", "{a} was happy with {x.n}."},
          {.a = 0, .x = 0});
    int x = t.from(0, depth), a = t.holder[x];
    t.ask("Who has {x.n} now", "{a.n} has {x.n}", {.a = a, .x = x}, 1u << a);
    if (t.chance(40)) {
        int b = t.from(1, depth);
        t.ask("What did {a.n} want", "{a.n} wanted {x.a}", {.a = b, .x = b}, 1u << b);
    }
}

// Who did what on which day.
void week(Teller& t) {
    static constexpr std::string_view days[] = {"Monday", "Tuesday",  "Wednesday", "Thursday",
                                                "Friday", "Saturday", "Sunday"};
    struct Deed {
        std::string_view past, plain;
    };
    static constexpr Deed deeds[] = {{"baked a cake", "bake a cake"},
                                     {"painted a boat", "paint a boat"},
                                     {"read a book", "read a book"},
                                     {"planted a tree", "plant a tree"},
                                     {"made a hat", "make a hat"},
                                     {"swam in the river", "swim in the river"},
                                     {"fed the ducks", "feed the ducks"},
                                     {"picked berries", "pick berries"},
                                     {"sang a song", "sing a song"},
                                     {"climbed the hill", "climb the hill"},
                                     {"slept all day", "sleep all day"},
                                     {"swept the floor", "sweep the floor"},
                                     {"went to the market", "go to the market"}};
    t.call(t.from(1, 2));
    int people = t.people(), n = t.from(3, 6), start = t.below(std::size(days) - n + 1);
    std::vector<int> done = t.some(n, std::size(deeds));
    std::vector<int> who(n);
    t.title({"{a.s} Week", "A Busy Week", "From {v} to {w}"},
            {.a = 0, .v = days[start], .w = days[start + n - 1]});
    t.say({"{all} had much to do.", "It was a busy week for {all}.", "This is what {all} did."});
    for (int i = 0; i < n; i++) {
        who[i] = t.below(people);
        t.say({"On {v}, {a} {w}.", "On {v}, {a} {w}.", "{a} {w} on {v}."},
              {.a = who[i], .v = days[start + i], .w = deeds[done[i]].past});
    }
    if (t.chance(50)) {
        t.paragraph();
        t.say({"Then the week was over.", "It was a good week.", "What a week it was!"});
    }
    auto recall = [&](int i) {
        Slots s = {.a = who[i], .v = days[start + i], .w = deeds[done[i]].plain};
        std::string answer = Teller::cat_words({"{a.n} ", deeds[done[i]].past, " on {v}"});
        t.ask(t.chance(50) ? "What did {a.n} do on {v}" : "When did {a.n} {w}", answer, s,
              1u << s.a);
    };
    std::vector<int> asked = t.some(2, n);
    recall(asked[0]);
    if (t.chance(60)) recall(asked[1]);
}

} // namespace

std::string story(uint64_t seed, uint64_t index) {
    // A key that no other stream of the run's seed uses.
    Teller t;
    t.seed = seed ^ fnv1a("stories"), t.index = index;
    t.text.reserve(1024);
    using Shape = void (*)(Teller&);
    static constexpr Shape shapes[] = {passing, passing, counting, counting, trading,   boxes,
                                       walking, walking, hiding,   seeking,  comparing, ordering,
                                       owners,  quest,   quest,    week};
    t.pick(shapes)(t);
    return t.text += '\n';
}

StorySource::StorySource(uint64_t seed) : seed(seed), tokenizer(load_tokenizer("bytes")->id()) {}

std::shared_ptr<const StorySource::Block> StorySource::block(uint64_t number) {
    std::lock_guard lock(mutex);
    for (const auto& [cached, block] : cache)
        if (block && cached == number) return block;
    auto made = std::make_shared<Block>();
    size_t at = 0;
    // A story has more than one byte, so a block needs fewer stories than it has tokens.
    for (uint64_t i = 0; at < block_tokens; i++) {
        std::string text = story(seed, number * block_tokens + i);
        size_t n = std::min(text.size(), block_tokens - at);
        for (size_t k = 0; k < n; k++)
            (*made)[at++] = uint16_t(static_cast<unsigned char>(text[k]));
        if (at < block_tokens) (*made)[at++] = uint16_t(tokenizer.eot);
    }
    cache[oldest] = {number, made};
    oldest = (oldest + 1) % cache.size();
    return made;
}

void StorySource::read(uint64_t pos, size_t n, int* out) {
    if (n > endless - pos)
        fail("cannot read tokens from ", pos, " of ", describe(), ", whose last is token ",
             endless - 1);
    while (n > 0) {
        std::shared_ptr<const Block> source = block(pos / block_tokens);
        size_t at = size_t(pos % block_tokens), here = std::min(n, block_tokens - at);
        std::copy_n(source->begin() + std::ptrdiff_t(at), here, out);
        pos += here, out += here, n -= here;
    }
}

std::string StorySource::describe() const {
    return cat("the built-in stories of seed ", seed, " (synthetic, endless, bytes)");
}

void StorySource::check_tokens(int vocab) {
    if (vocab < tokenizer.vocab_size)
        fail(describe(), " need a vocabulary of ", tokenizer.vocab_size,
             " (256 bytes and end-of-text), but the model's is ", vocab,
             ". Increase --vocab, or train on shards");
}

} // namespace lns
