"""Make assets/sample_squad: 4,000 SQuAD-format rows from the short notes of eight imaginary hospital sites.

usage: python assets/make_sample_squad.py [--rows 10000 --folder FOLDER]

--rows makes so many training rows a site instead of 475, in another folder: differential privacy needs many.

Each site writes its notes in a style of its own and asks its own kinds of question, so that a client which knows one
site only has never seen what the others ask. Nothing here is about a real person: names, doses and results are drawn
at random, and an answer can only be found by reading the note. The seed makes the files the same on every machine.
"""

import argparse
import json
import random
from pathlib import Path

ROWS_PER_SITE = {"train": 475, "validation": 25}

FIRST = """Ada Amal Amir Anna Boris Carla Chen Clara Dana David Dora Elena Emil Farah Felix Greta Hana Hugo Ines Ivan Jana
Jonas Kaya Lena Leo Lina Marco Maya Milan Mina Nadia Nils Nora Omar Otto Paula Petra Rosa Samir Sara Tara Theo Vera
Viktor Yara Yusuf Zara Zoe""".split()
LAST = """Abbott Baker Berg Brandt Castro Conti Cooper Costa Diaz Ellis Falk Fischer Ford Garcia Gupta Haas Hall Hansen Holt
Hunt Ito Jensen Kaur Keller Khan Klein Kumar Lang Lopez Marsh Meyer Moreau Nash Novak Olsen Park Patel Price Quinn Reyes
Rossi Sato Shaw Silva Stone Tanaka Vogel Walsh Weber Wolf Yilmaz Young""".split()
DRUG = """aspirin atenolol bisoprolol cefalexin codeine digoxin doxazosin enalapril furosemide gliclazide heparin ibuprofen
insulin irbesartan ketamine labetalol lisinopril losartan metformin metoprolol morphine naproxen nifedipine omeprazole
oxycodone paracetamol prednisone quinine ramipril ranitidine sertraline simvastatin tramadol trimethoprim verapamil
warfarin""".split()
TEST = """albumin ammonia bilirubin calcium chloride copper creatinine ferritin folate fibrinogen glucose haemoglobin iron
lactate lipase magnesium phosphate platelets potassium protein sodium thyroxine troponin urea zinc""".split()
ORGAN = """gallbladder appendix spleen thyroid kidney tonsils uterus bladder stomach prostate pancreas meniscus polyp cyst
hernia cataract""".split()
SYMPTOM = [f"{where} {kind}" for kind in ("pain", "swelling", "numbness", "burning", "itching", "cramps")
           for where in ("chest", "back", "left arm", "right arm", "left leg", "right leg", "neck", "jaw", "belly", "hip")]  # fmt: skip
FINDING = "nodule mass cyst stone fracture shadow effusion polyp calcification abscess scar clot".split()
PLACE = [f"{side} {part}" for side in ("left", "right", "upper", "lower")
         for part in ("lung", "kidney", "liver", "rib", "femur", "hip", "shoulder", "wrist", "jaw", "spine")]  # fmt: skip
CARE = [f"{verb} {thing}" for verb in ("changed", "checked", "cleaned", "removed", "replaced")
        for thing in ("dressing", "drip", "catheter", "drain", "bandage", "sheets", "cannula", "pump")]  # fmt: skip
ILLNESS = """pneumonia asthma sepsis stroke angina anaemia diabetes gastritis hepatitis migraine epilepsy eczema gout
bronchitis cellulitis colitis""".split()
TOWN = """Ashford Bexley Camden Dunmore Epping Farnham Goring Harlow Ilford Kendal Ludlow Malton Newark Oakham Penrith
Redhill Selby Thirsk Wells Yarm""".split()
CARRIER = "ambulance taxi bus car train minibus tram ferry".split()
MATTER = "invoice referral prescription letter scan insurance vaccine booking test result bed".split()
MONTH = "January February March April May June July August September October November December".split()

# slot -> how its value is drawn; a digit after the name (drug1, drug2) makes a further slot of the same kind
DRAW = {
    "name": lambda r: f"{r.choice(FIRST)} {r.choice(LAST)}",
    "doctor": lambda r: f"{r.choice(LAST)}",
    "age": lambda r: str(r.randint(18, 99)),
    "time": lambda r: f"{r.randint(0, 23):02}:{r.randint(0, 59):02}",
    "date": lambda r: f"{r.randint(1, 28)} {r.choice(MONTH)}",
    "bp": lambda r: f"{r.randint(90, 190)}/{r.randint(50, 110)}",
    "pulse": lambda r: str(r.randint(45, 150)),
    "temp": lambda r: f"{r.randint(35, 40)}.{r.randint(0, 9)}",
    "room": lambda r: f"{r.choice('ABCDEFGH')}{r.randint(1, 40)}",
    "drug": lambda r: r.choice(DRUG),
    "dose": lambda r: f"{r.randint(1, 99) * 5} mg",
    "test": lambda r: r.choice(TEST),
    "value": lambda r: f"{r.randint(1, 400)}.{r.randint(0, 9)}",
    "size": lambda r: f"{r.randint(2, 90)} mm",
    "phone": lambda r: f"{r.randint(200, 999)} {r.randint(1000, 9999)}",
    "organ": lambda r: r.choice(ORGAN),
    "symptom": lambda r: r.choice(SYMPTOM),
    "finding": lambda r: r.choice(FINDING),
    "place": lambda r: r.choice(PLACE),
    "care": lambda r: r.choice(CARE),
    "illness": lambda r: r.choice(ILLNESS),
    "town": lambda r: r.choice(TOWN),
    "carrier": lambda r: r.choice(CARRIER),
    "matter": lambda r: r.choice(MATTER),
}

# site -> the note, the questions asked there by the slot that answers them, and by label what else the note says (the
# labels are for the pretraining of the tiny LLaMA; no question of a site is part of it)
SITES = {
    "northgate": {  # emergency department: telegraphic
        "note": "ED {time}, {name}, {age} y. c/o {symptom}. BP {bp}, HR {pulse}, T {temp}. Seen by Dr {doctor}.",
        "ask": {
            "bp": ["What was the blood pressure?", "Which pressure was measured on arrival?"],
            "pulse": ["How fast was the heart beating?", "What was the pulse?"],
            "symptom": ["What did the patient complain of?", "Why did the patient come in?"],
        },
        "say": {
            "pressure": "bp",
            "pulse": "pulse",
            "complaint": "symptom",
            "temperature": "temp",
            "age": "age",
            "doctor": "doctor",
        },
    },
    "riverside": {  # pharmacy: prescriptions
        "note": "Rx {name}: {drug} {dose} daily at {time} against {illness}, from Dr {doctor}.",
        "ask": {
            "drug": ["Which medicine is ordered?", "What does the patient take?"],
            "dose": ["How much is given?", "What is the daily dose?"],
            "time": ["When is it due?", "At what time is it taken?"],
        },
        "say": {
            "drug": "drug",
            "amount": "dose",
            "time": "time",
            "illness": "illness",
            "doctor": "doctor",
            "patient": "name",
        },
    },
    "hillcrest": {  # surgery: prose
        "note": "On {date} Dr {doctor1}, assisted by Dr {doctor2}, operated on {name} in theatre {room} and removed the {organ}.",
        "ask": {
            "doctor1": ["Who was the surgeon?", "Who led the operation?"],
            "doctor2": ["Who assisted the surgeon?", "Who was the second doctor?"],
            "organ": ["What was taken out?", "Which organ did the patient lose?"],
        },
        "say": {
            "surgeon": "doctor1",
            "assistant": "doctor2",
            "organ": "organ",
            "theatre": "room",
            "date": "date",
            "patient": "name",
        },
    },
    "lakeside": {  # laboratory: a table
        "note": "Lab {date} | {test1} | {value1} | {test2} | {value2} | {test3} | {value3} | ! | {name}",
        "ask": {
            "value1": ["What is the level of {test1}?", "How high is {test1}?"],
            "test3": ["Which test is out of range?", "Which result is flagged?"],
            "date": ["On which day was the sample drawn?", "When was the blood taken?"],
        },
        "say": {
            "level of {test1}": "value1",
            "level of {test2}": "value2",
            "level of {test3}": "value3",
            "abnormal test": "test3",
            "date": "date",
            "patient": "name",
        },
    },
    "saintagnes": {  # radiology: headings
        "note": "EXAM {date} in {room}. FINDING {finding} in {place}, {size}. ADVICE biopsy by Dr {doctor}.",
        "ask": {
            "size": ["How large is the lesion?", "What does the lesion measure?"],
            "place": ["Where does the lesion sit?", "Which part of the body is abnormal?"],
            "finding": ["What kind of lesion was seen?", "What did the images show?"],
        },
        "say": {
            "size": "size",
            "place": "place",
            "finding": "finding",
            "doctor": "doctor",
            "date": "date",
            "room": "room",
        },
    },
    "oakwood": {  # nursing: a log by time
        "note": "Night log {room}: {time1} {care1}; {time2} {care2}; {time3} {care3}. Nurse {name}.",
        "ask": {
            "care1": ["What was the first task?", "What did the nurse do at {time1}?"],
            "care3": ["What was the last task?", "What did the nurse do at {time3}?"],
            "name": ["Which nurse was on duty?", "Who kept watch?"],
        },
        "say": {
            "task at {time1}": "care1",
            "task at {time2}": "care2",
            "task at {time3}": "care3",
            "first task": "care1",
            "last task": "care3",
            "nurse": "name",
            "room": "room",
        },
    },
    "eastfield": {  # discharge letters
        "note": "Dear Dr {doctor}, {name} went home to {town} by {carrier} after {illness}. Next visit {date}, room {room}.",
        "ask": {
            "town": ["Where does the patient live?", "To which town was the patient sent?"],
            "carrier": ["How did the patient travel?", "Which transport was used?"],
            "illness": ["What was the diagnosis?", "Which disease was treated?"],
        },
        "say": {
            "home": "town",
            "transport": "carrier",
            "illness": "illness",
            "visit": "date",
            "doctor": "doctor",
            "patient": "name",
        },
    },
    "westbrook": {  # telephone desk
        "note": "CALL {time}: {name} about the {matter}. Ring {phone}, ask for {doctor}. Taken in {room}.",
        "ask": {
            "phone": ["Which number should be called back?", "What is the telephone number?"],
            "matter": ["What is the call about?", "What does the caller want to discuss?"],
            "doctor": ["Whom should one ask for?", "Who will answer the phone?"],
        },
        "say": {
            "number": "phone",
            "matter": "matter",
            "contact": "doctor",
            "caller": "name",
            "time": "time",
            "room": "room",
        },
    },
}


def draw_note(site, rng):
    """Draw one note of `site`; returns (text, {slot: value}), where each value stands in the text exactly once."""
    slots = {field.split("}")[0] for field in SITES[site]["note"].split("{")[1:]}
    while True:
        values = {slot: DRAW[slot.rstrip("123")](rng) for slot in sorted(slots)}
        text = SITES[site]["note"].format(**values)
        if all(text.count(value) == 1 for value in values.values()):
            return text, values


def make_rows(split, rows_per_site, seed=0):
    """Make the rows of one split, the same number for every site, in random order."""
    rng = random.Random(f"{split}-{seed}")
    rows = []
    for site, spec in SITES.items():
        for number in range(rows_per_site):
            context, values = draw_note(site, rng)
            slot = rng.choice(sorted(spec["ask"]))
            answer = {"text": [values[slot]], "answer_start": [context.index(values[slot])]}
            question = rng.choice(spec["ask"][slot]).format(**values)
            rows.append({"id": f"{site}-{split}-{number}", "site": site, "context": context, "question": question, "answers": answer})  # fmt: skip
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=ROWS_PER_SITE["train"])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "sample_squad")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True, parents=True)
    for split, rows_per_site in (ROWS_PER_SITE | {"train": args.rows}).items():
        rows = make_rows(split, rows_per_site)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
