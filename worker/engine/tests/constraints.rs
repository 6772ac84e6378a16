//! Texts that must have a form, on the real model: they have it, in whatever company, however often they start anew.

mod common;

use common::listener::{Heard, Listener, options};
use serde_json::Value;
use stoker_engine::*;

const PERSON: &str = r#"{
    "type": "object",
    "properties": {
        "name": { "type": "string", "minLength": 1, "maxLength": 12 },
        "age": { "type": "integer", "minimum": 1, "maximum": 120 },
        "mood": { "enum": ["happy", "sad", "so-so"] },
        "home": {
            "type": "object",
            "properties": { "city": { "type": "string", "maxLength": 12 }, "own": { "type": "boolean" } },
            "required": ["city", "own"],
            "additionalProperties": false
        },
        "scores": { "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 9 }, "minItems": 1, "maxItems": 3 }
    },
    "required": ["name", "age", "mood", "home", "scores"],
    "additionalProperties": false
}"#;
const GREETING: &str = "start: (\"Hello\" | \"Goodbye\") \", \" NAME \"!\"\nNAME: /[A-Z][a-z]{1,8}/";
const DATE: &str = "[A-Z][a-z]{2,8} [0-9]{1,2}, [12][0-9]{3}";

fn request(id: u64, question: &str, constraint: Option<Constraint>) -> Request {
    let message = ChatMessage { role: "user".into(), content: question.into() };
    Request {
        id: SequenceId(id),
        prompt: Prompt::Chat(vec![message]),
        sampling: Sampling { temperature: (id % 2) as f32, seed: 70 + id, ..Sampling::default() },
        max_tokens: Some(150),
        stop: Vec::new(),
        constraint,
        resume: Resume::default(),
        priority: Priority::Interactive,
        deadline: None,
        user: 0,
    }
}

/// Of every kind one that is greedy and one that is drawn; and texts without a form beside them.
fn requests() -> Vec<Request> {
    let person = || Some(Constraint::JsonSchema(PERSON.into()));
    let date = || Some(Constraint::Regex(DATE.into()));
    let greeting = || Some(Constraint::Lark(GREETING.into()));
    let texts = [
        ("Describe a person in JSON.", person()),
        ("Invent somebody.", person()),
        ("When did World War II end?", date()),
        ("When were you born?", date()),
        ("Greet Anna.", greeting()),
        ("Say goodbye to Bob.", greeting()),
        ("What is tea?", None),
        ("Write about the sea.", None),
    ];
    let requests =
        texts.into_iter().zip(0..).map(|((question, constraint), id)| request(id, question, constraint));
    requests
        .map(|request| match request.constraint {
            Some(_) => request,
            None => Request { max_tokens: Some(40), ..request },
        })
        .collect()
}

fn reason(heard: &Heard) -> &FinishReason {
    &heard.finish.as_ref().unwrap().reason
}

/// Whether a text has the form it must have.
fn fits(constraint: &Constraint, text: &str) -> bool {
    match constraint {
        Constraint::JsonObject => serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object()),
        Constraint::JsonSchema(_) => serde_json::from_str(text).is_ok_and(|value| is_person(&value)),
        Constraint::Regex(_) => is_date(text),
        Constraint::Lark(_) => is_greeting(text),
    }
}

fn is_person(value: &Value) -> bool {
    let keys = |value: &Value| value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>());
    let short =
        |value: &Value, least| value.as_str().is_some_and(|s| (least..=12).contains(&s.chars().count()));
    let within = |value: &Value, low, high| value.as_i64().is_some_and(|n| (low..=high).contains(&n));
    let scores = value["scores"].as_array();
    keys(value).is_some_and(|keys| keys == ["name", "age", "mood", "home", "scores"])
        && short(&value["name"], 1)
        && within(&value["age"], 1, 120)
        && ["happy", "sad", "so-so"].iter().any(|mood| value["mood"] == *mood)
        && keys(&value["home"]).is_some_and(|keys| keys == ["city", "own"])
        && short(&value["home"]["city"], 0)
        && value["home"]["own"].is_boolean()
        && scores.is_some_and(|s| (1..=3).contains(&s.len()) && s.iter().all(|n| within(n, 0, 9)))
}

fn is_name(text: &str, letters: std::ops::RangeInclusive<usize>) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_uppercase())
        && letters.contains(&chars.as_str().len())
        && chars.all(|c| c.is_ascii_lowercase())
}

fn is_date(text: &str) -> bool {
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let Some(((month, day), year)) =
        text.split_once(", ").and_then(|(day, year)| Some((day.split_once(' ')?, year)))
    else {
        return false;
    };
    is_name(month, 2..=8)
        && (1..=2).contains(&day.len())
        && number(day)
        && year.len() == 4
        && year.starts_with(['1', '2'])
        && number(year)
}

fn is_greeting(text: &str) -> bool {
    let name = ["Hello, ", "Goodbye, "].iter().find_map(|words| text.strip_prefix(words));
    name.and_then(|name| name.strip_suffix('!')).is_some_and(|name| is_name(name, 1..=8))
}

#[test]
fn texts_have_their_form_alone_together_and_preempted() {
    let listener = Listener::load(options());
    let alone: Vec<_> = requests().into_iter().map(|request| listener.run_one(request)).collect();
    for (request, heard) in requests().iter().zip(&alone) {
        let Some(constraint) = &request.constraint else { continue };
        assert!(fits(constraint, &heard.text), "{:?} for {constraint:?}", heard.text);
        assert_eq!(*reason(heard), FinishReason::Stop);
    }
    let same = |other: Vec<Heard>| {
        for (one, other) in alone.iter().zip(&other) {
            assert_eq!((&one.tokens, &one.text, reason(one)), (&other.tokens, &other.text, reason(other)));
        }
    };
    same(listener.run(requests()));
    let cramped = LoadOptions { kv_positions: Some(288), context: Some(256), ..options() };
    same(Listener::load(cramped).run(requests()));
}

#[test]
fn a_json_object_is_one() {
    let listener = Listener::load(options());
    for id in 0..4 {
        // A schema-less object may go on for ever: this one has a reason to end.
        let request = request(
            id,
            "Reply with this JSON and nothing else: {\"ok\": true}",
            Some(Constraint::JsonObject),
        );
        let heard = listener.run_one(request);
        let text = &heard.text;
        assert!(text.starts_with('{'), "{text:?}");
        match reason(&heard) {
            FinishReason::Stop => assert!(fits(&Constraint::JsonObject, text), "{text:?}"),
            reason => assert_eq!((id % 2, reason), (1, &FinishReason::Length), "{text:?}"),
        }
    }
}

#[test]
fn drawn_texts_have_their_form_whatever_the_seed() {
    let listener = Listener::load(options());
    let person = Constraint::JsonSchema(PERSON.into());
    let draw = |id: u64| {
        let mut request = request(id, "Describe a person in JSON.", Some(person.clone()));
        request.sampling =
            Sampling { temperature: 1.5, seed: id, frequency_penalty: 1.0, ..Sampling::default() };
        request
    };
    for heard in listener.run((0..24).map(draw).collect()) {
        assert!(fits(&person, &heard.text), "{:?}", heard.text);
    }
}

#[test]
fn resumed_at_any_token_a_text_goes_on_as_if_never_interrupted() {
    let listener = Listener::load(options());
    for request in requests().into_iter().filter(|request| request.constraint.is_some()) {
        let whole = listener.run_one(request.clone());
        let cuts: Vec<_> = (1..whole.tokens.len()).collect();
        let resumed = |&cut: &usize| Request {
            id: SequenceId(cut as u64),
            resume: Resume { tokens: whole.tokens[..cut].to_vec(), text: String::new() },
            ..request.clone()
        };
        for (cut, rest) in cuts.iter().zip(listener.run(cuts.iter().map(resumed).collect())) {
            assert_eq!(rest.tokens, whole.tokens[*cut..], "{:?} cut at {cut}", whole.text);
            assert!(whole.text.ends_with(&rest.text));
            assert_eq!(reason(&rest), reason(&whole));
        }
        let done =
            Request { resume: Resume { tokens: whole.tokens.clone(), text: whole.text.clone() }, ..request };
        assert_eq!((listener.run_one(done).tokens.len(), reason(&whole)), (0, &FinishReason::Stop));
    }
}

#[test]
fn a_limit_cuts_and_a_stop_string_ends_a_text_all_the_same() {
    let listener = Listener::load(options());
    let request = requests().remove(0);
    let whole = listener.run_one(request.clone());
    let cut = listener.run_one(Request { max_tokens: Some(9), ..request.clone() });
    assert_eq!((cut.tokens.as_slice(), reason(&cut)), (&whole.tokens[..9], &FinishReason::Length));
    assert!(whole.text.starts_with(&cut.text));
    let stopped = listener.run_one(Request { stop: vec!["\"age\"".into()], ..request });
    assert_eq!(Some(stopped.text.as_str()), whole.text.split("\"age\"").next());
}

#[test]
fn a_form_that_makes_no_sense_is_refused_saying_why() {
    let listener = Listener::load(options());
    let json = |schema: &str| Constraint::JsonSchema(schema.into());
    let deep = format!(
        "start: t0\n{}t3000: \"a\"",
        (0..3000).map(|i| format!("t{i}: \"a\" t{}\n", i + 1)).collect::<String>()
    );
    // Each definition is two of the one before: a gigabyte from three kilobytes.
    let below = |i: usize| format!("{{\"type\": \"array\", \"$ref\": \"#/$defs/a{i}\"}}");
    let definitions: Vec<_> = (1..30)
        .map(|i| format!("\"a{i}\": {{\"type\": \"array\", \"prefixItems\": [{0}, {0}]}}", below(i - 1)))
        .collect();
    let doubling = format!(
        "{{\"$ref\": \"#/$defs/a29\", \"$defs\": {{\"a0\": {{\"type\": \"array\"}}, {}}}}}",
        definitions.join(", ")
    );
    for (constraint, why) in [
        (json("{"), "EOF"),
        (json("[]"), "object"),
        (json(r#"{"type": "objekt"}"#), "objekt"),
        (json(r#"{"type": "array", "uniqueItems": true}"#), "uniqueItems"),
        (json(r#"{"not": {"type": "string"}}"#), "not"),
        (json(r#"{"type": "string", "format": "colour"}"#), "colour"),
        (json(r#"{"$ref": "http://example.com/schema"}"#), "http://example.com/schema"),
        (json(r#"{"type": "integer", "minimum": 5, "maximum": 3}"#), "minimum"),
        (json(r#"{"type": "string", "pattern": "("}"#), "("),
        (json(r#"{"items": {"type": "integer", "multipleOf": 1234567}}"#), "multipleOf 1234567"),
        (json(&format!("{{\"enum\": [\"{}\"]}}", "x".repeat(70_000))), "bytes"),
        (Constraint::Regex("(a".into()), "(a"),
        (Constraint::Regex("a(?=b)".into()), "look"),
        (Constraint::Regex(String::new()), "empty"),
        (Constraint::Lark("start: nothing".into()), "nothing"),
        (Constraint::Lark("start: start".into()), "nothing fits"),
        (Constraint::Lark("start: <|im_start|>".into()), "fails"),
        (Constraint::Lark("start: %json { \"multipleOf\": 1234567 }".into()), "multipleOf"),
        (Constraint::Lark("start: %json { \"multiple\\u004ff\": 1234567 }".into()), "multipleOf"),
        (json(&doubling), "merged"),
        (Constraint::Lark(format!("start: %json {doubling}")), "merged"),
        (Constraint::Lark(format!("start: {}\"a\"{}", "(".repeat(9000), ")".repeat(9000))), "nested"),
    ] {
        let heard = listener.run_one(request(0, "Hi", Some(constraint.clone())));
        let FinishReason::Error(error) = reason(&heard) else { panic!("{constraint:?}: {heard:?}") };
        assert_eq!(error.kind, RequestErrorKind::Invalid, "{error}");
        assert!(error.message.contains(why) && !error.message.contains("<non-verbose"), "{error}");
        assert!(heard.tokens.is_empty());
    }
    // Deep, but not without end: what would overflow a common stack is followed.
    let heard =
        listener.run_one(Request { max_tokens: Some(5), ..request(0, "Hi", Some(Constraint::Lark(deep))) });
    assert_eq!((heard.text.trim_matches('a'), reason(&heard)), ("", &FinishReason::Length));
}

#[test]
fn a_form_that_becomes_too_much_ends_its_own_text_only() {
    let listener = Listener::load(options());
    let properties: Vec<_> = (0..2000).map(|i| format!("\"p{i}\": {{\"type\": \"string\"}}")).collect();
    let schema = format!("{{\"type\": \"object\", \"properties\": {{{}}}}}", properties.join(","));
    let mut all = requests();
    let expected = listener.run(requests());
    all.push(request(99, "Hi", Some(Constraint::JsonSchema(schema))));
    let mut heard = listener.run(all);
    let FinishReason::Error(error) = reason(&heard.pop().unwrap()).clone() else { panic!("it is followed") };
    assert_eq!(error.kind, RequestErrorKind::Invalid);
    assert!(error.message.contains("can't be followed any further"), "{error}");
    for (heard, expected) in heard.iter().zip(&expected) {
        assert_eq!((&heard.text, reason(heard)), (&expected.text, reason(expected)));
    }
}
