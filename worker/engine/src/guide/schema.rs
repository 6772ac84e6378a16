//! What of a JSON schema the library would work on without a limit of its own: it is refused before.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

/// Greatest `multipleOf`, as digits without their point: as many states it takes to follow a number.
const GREATEST_DIVISOR: f64 = 10_000.0;
/// Most different `patternProperties`: each pair of them is proved to be disjoint, whenever objects are merged.
const MOST_PATTERNS: usize = 16;
/// Most parts of a schema when its conjunctions are merged.
const MOST_PARTS: f64 = 400_000.0;
/// Memory of a part, bytes, about.
const PART_BYTES: f64 = 250.0;
/// Keys of a schema's own, which make one conjunct together.
const OWN: [&str; 9] = [
    "type",
    "properties",
    "patternProperties",
    "prefixItems",
    "items",
    "additionalItems",
    "additionalProperties",
    "pattern",
    "format",
];

/// Whether the library can take a schema; if not, why.
pub(super) fn check(schema: &Value) -> Result<(), String> {
    let mut facts = Facts::default();
    facts.collect(schema)?;
    if facts.patterns.len() > MOST_PATTERNS {
        let count = facts.patterns.len();
        return Err(format!("{count} different patternProperties; {MOST_PATTERNS} are the most"));
    }
    let mut sizes = Sizes::new(schema, facts.tuples);
    let mut parts = sizes.of(schema, false).all();
    while let Some(target) = sizes.kept.pop() {
        parts += sizes.of(target, false).all();
    }
    // No number: infinitely many, times none.
    if parts.is_nan() || parts > MOST_PARTS {
        return Err(
            "its allOf, anyOf and $ref beside other keys would make too much of it when they are merged"
                .into(),
        );
    }
    Ok(())
}

/// What is counted in the whole text, wherever it stands.
#[derive(Default)]
struct Facts<'a> {
    /// Of `patternProperties`; objects that are merged have each once.
    patterns: HashSet<&'a str>,
    /// Whether there are arrays whose first elements have schemas of their own.
    tuples: bool,
}

impl<'a> Facts<'a> {
    fn collect(&mut self, value: &'a Value) -> Result<(), String> {
        match value {
            Value::Object(object) => {
                if let Some(divisor) = object.get("multipleOf").and_then(Value::as_f64) {
                    let digits = divisor.to_string().replace('.', "").parse().unwrap_or(f64::INFINITY);
                    if digits > GREATEST_DIVISOR {
                        return Err(format!("multipleOf {divisor} has too many digits"));
                    }
                }
                let patterns = object.get("patternProperties").and_then(Value::as_object);
                self.patterns.extend(patterns.into_iter().flat_map(Map::keys).map(String::as_str));
                let types = object.get("type").and_then(Value::as_array).into_iter().flatten();
                let types: Vec<_> = types.filter_map(Value::as_str).collect();
                if let Some(twice) =
                    types.iter().find(|kind| types.iter().filter(|other| other == kind).count() > 1)
                {
                    return Err(format!("type names {twice:?} twice"));
                }
                self.tuples |=
                    object.contains_key("prefixItems") || object.get("items").is_some_and(Value::is_array);
                self.tuples |= ["const", "enum"].iter().any(|key| object.get(*key).is_some_and(holds_array));
                object.values().try_for_each(|value| self.collect(value))
            }
            Value::Array(values) => values.iter().try_for_each(|value| self.collect(value)),
            _ => Ok(()),
        }
    }
}

/// Whether a constant, or one of several, is or has an array.
fn holds_array(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.iter().any(|value| value.is_array() || holds_array(value)),
        Value::Object(object) => object.values().any(|value| value.is_array() || holds_array(value)),
        _ => false,
    }
}

/// How large a schema is, from above, and how it makes another grow that is merged with it.
#[derive(Clone, Copy)]
struct Size {
    /// Arrays, objects and what may be any of them; the schema itself included.
    parts: f64,
    /// Strings, numbers and the like, with what their texts weigh.
    scalars: f64,
    /// How many alternatives of each of the two there are at most at one place: each gets a copy of the other schema's.
    options: f64,
    scalar_options: f64,
    /// Those of its parts and scalars that are for any element or property, so that the other's elements and properties each
    /// get a copy.
    loose: f64,
    /// Those of the loose that are so again within.
    loose_again: f64,
}

impl Size {
    const NOTHING: Self =
        Self { parts: 0.0, scalars: 0.0, options: 1.0, scalar_options: 1.0, loose: 0.0, loose_again: 0.0 };
    /// Anything.
    const ONE: Self = Self { parts: 1.0, scalars: 1.0, ..Self::NOTHING };

    /// A constant or a string whose text has so many bytes.
    fn scalar(bytes: usize) -> Self {
        Self { scalars: 1.0 + bytes as f64 / PART_BYTES, ..Self::NOTHING }
    }

    fn all(self) -> f64 {
        self.parts + self.scalars
    }

    /// With a schema inside.
    fn with(self, inner: Self, loose: bool) -> Self {
        Self {
            parts: self.parts + inner.parts,
            scalars: self.scalars + inner.scalars,
            options: self.options.max(inner.options),
            scalar_options: self.scalar_options.max(inner.scalar_options),
            loose: self.loose + if loose { inner.all() } else { inner.loose },
            loose_again: self.loose_again + if loose { inner.loose } else { inner.loose_again },
        }
    }

    /// Of what fits both.
    fn and(self, other: Self) -> Self {
        let copies = self.loose * other.all() + other.loose * self.all();
        let again = self.loose_again.max(other.loose_again) > 0.0;
        Self {
            parts: self.parts * other.options + other.parts * self.options + copies,
            scalars: self.scalars * other.options * other.scalar_options
                + other.scalars * self.options * self.scalar_options,
            options: self.options * other.options,
            scalar_options: self.scalar_options * other.scalar_options,
            loose: self.loose * other.options
                + other.loose * self.options
                + self.loose_again * other.all()
                + other.loose_again * self.all(),
            loose_again: if again { self.all() * other.all() } else { 0.0 },
        }
    }

    /// Of what fits one of several.
    fn any(all: impl Iterator<Item = Self>) -> Self {
        let mut any = Self { options: 0.0, scalar_options: 0.0, ..Self::NOTHING };
        for one in all {
            // What has only scalars, or only others, is no alternative of the others.
            let options = any.options + if one.parts > 0.0 { one.options } else { 0.0 };
            let scalar_options =
                any.scalar_options + if one.scalars > 0.0 { one.scalar_options } else { 0.0 };
            any = Self { options, scalar_options, ..any.with(one, false) };
        }
        Self { options: any.options.max(1.0), scalar_options: any.scalar_options.max(1.0), ..any }
    }
}

struct Sizes<'a> {
    root: &'a Value,
    tuples: bool,
    /// References that stay what they are.
    references: HashSet<&'a str>,
    /// Their targets, as far as they are not counted yet.
    kept: Vec<&'a Value>,
    /// Sizes of targets that are copied to where they are merged; `None` while one is being found out.
    merged: HashMap<&'a str, Option<Size>>,
    /// Those that lead back to themselves.
    recursive: HashSet<&'a str>,
}

impl<'a> Sizes<'a> {
    fn new(root: &'a Value, tuples: bool) -> Self {
        Self {
            root,
            tuples,
            references: HashSet::new(),
            kept: Vec::new(),
            merged: HashMap::new(),
            recursive: HashSet::new(),
        }
    }

    /// As the library finds it.
    fn target(&self, reference: &str) -> Option<&'a Value> {
        let path = reference.strip_prefix('#')?;
        let mut segments = path.split('/').skip(1).filter(|_| path != "/");
        segments.try_fold(self.root, |value, segment| match value {
            Value::Array(values) => values.get(segment.parse::<usize>().ok()?),
            value => value.get(segment),
        })
    }

    /// `merged`: it is merged with another, so that references in it may be replaced by their targets.
    fn of(&mut self, schema: &'a Value, merged: bool) -> Size {
        let Some(object) = schema.as_object() else { return Size::ONE };
        let list = |key: &str| object.get(key).and_then(Value::as_array).map_or(&[][..], |list| list);
        let map = |key: &str| object.get(key).and_then(Value::as_object).into_iter().flat_map(Map::values);
        let (properties, patterns) = (map("properties").count(), map("patternProperties").count());
        let has_own = OWN.iter().any(|key| object.contains_key(*key));
        let conjuncts = usize::from(has_own)
            + ["const", "enum", "anyOf", "oneOf", "$ref"]
                .iter()
                .filter(|key| object.contains_key(**key))
                .count()
            + list("allOf").len();
        let merged = merged || conjuncts > 1 || properties > 0 && patterns > 0;

        let text =
            ["pattern", "format"].iter().filter_map(|key| object.get(*key)?.as_str()).map(str::len).sum();
        let mut size = match object.get("type").and_then(Value::as_str) {
            Some("object" | "array") => Size { parts: 1.0, ..Size::NOTHING },
            Some(_) => Size::scalar(text),
            None if has_own || conjuncts == 0 => Size { parts: 1.0, ..Size::scalar(text) },
            None => Size::NOTHING,
        };
        for inner in map("properties") {
            size = size.with(self.of(inner, merged), false);
        }
        for inner in map("patternProperties") {
            let inner = self.of(inner, merged);
            size = size.with(inner, true);
            // Each property that a pattern fits is merged with a copy of the pattern's schema.
            size.parts += properties as f64 * inner.all();
        }
        for inner in list("prefixItems").iter().chain(list("items")) {
            size = size.with(self.of(inner, merged), false);
        }
        for (key, loose) in
            [("items", self.tuples), ("additionalItems", true), ("additionalProperties", true)]
        {
            if let Some(inner) = object.get(key).filter(|inner| inner.is_object()) {
                size = size.with(self.of(inner, merged), loose);
            }
        }
        if let Some(constant) = object.get("const") {
            size = size.and(self::constant(constant));
        }
        if object.contains_key("enum") {
            size = size.and(Size::any(list("enum").iter().map(self::constant)));
        }
        for part in list("allOf") {
            size = size.and(self.of(part, merged));
        }
        for key in ["anyOf", "oneOf"] {
            if object.contains_key(key) {
                let options: Vec<Size> = list(key).iter().map(|option| self.of(option, merged)).collect();
                size = size.and(Size::any(options.into_iter()));
            }
        }
        if let Some(reference) = object.get("$ref").and_then(Value::as_str) {
            size = size.and(self.reference(reference, merged));
        }
        size
    }

    fn reference(&mut self, reference: &'a str, merged: bool) -> Size {
        if !merged {
            if self.references.insert(reference) {
                self.kept.extend(self.target(reference));
            }
            return Size::ONE;
        }
        match self.merged.get(reference) {
            Some(Some(size)) => *size,
            Some(None) => {
                self.recursive.insert(reference);
                Size::ONE
            }
            None => {
                self.merged.insert(reference, None);
                let mut size = self.target(reference).map_or(Size::ONE, |target| self.of(target, true));
                if self.recursive.contains(reference) {
                    // It goes as deep as what it is merged with.
                    (size.loose, size.loose_again) = (size.all(), size.all());
                }
                self.merged.insert(reference, Some(size));
                size
            }
        }
    }
}

/// The size of a constant.
fn constant(value: &Value) -> Size {
    let object = Size { parts: 1.0, ..Size::NOTHING };
    match value {
        Value::Array(values) => values.iter().fold(object, |size, value| size.with(constant(value), false)),
        Value::Object(map) => map.values().fold(object, |size, value| size.with(constant(value), false)),
        Value::String(text) => Size::scalar(text.len()),
        _ => Size::scalar(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(schema: Value) -> bool {
        check(&schema).is_err()
    }

    /// Each level is twice the one below, and the text a line longer.
    #[test]
    fn references_that_double_when_they_are_merged_are_refused() {
        let chain = |levels: usize, items: usize| {
            let mut definitions = json!({ "a0": { "type": "array" } });
            for level in 1..=levels {
                let below = json!({ "type": "array", "$ref": format!("#/$defs/a{}", level - 1) });
                definitions[format!("a{level}")] =
                    json!({ "type": "array", "prefixItems": vec![below; items] });
            }
            json!({ "type": "array", "$ref": format!("#/$defs/a{levels}"), "$defs": definitions })
        };
        assert!(!refused(chain(8, 2)));
        assert!(refused(chain(30, 2)));
        assert!(refused(chain(200, 40)), "more than a float can tell");
        // The same without anything to merge.
        let mut plain = chain(30, 2);
        for level in 1..=30 {
            let below = json!({ "$ref": format!("#/$defs/a{}", level - 1) });
            plain["$defs"][format!("a{level}")] = json!({ "type": "array", "prefixItems": [below, below] });
        }
        assert!(refused(plain.clone()), "the root itself merges");
        plain.as_object_mut().unwrap().remove("type");
        assert!(!refused(plain));
    }

    #[test]
    fn what_is_copied_to_each_of_many_is_refused() {
        let many: Vec<_> = (0..3000).map(|i| (format!("p{i}"), json!({ "type": "string" }))).collect();
        let large = json!({ "type": "object", "properties": many.iter().cloned().collect::<Map<_, _>>() });
        let arrays = vec![json!({ "type": "array" }); 2000];
        let tuple =
            json!({ "type": "array", "prefixItems": vec![json!(true); 6500], "allOf": [{ "items": large }] });
        assert!(refused(tuple));
        assert!(refused(json!({ "anyOf": arrays, "allOf": [{ "type": "array", "items": large }] })));
        let objects =
            json!({ "properties": large["properties"], "allOf": [{ "additionalProperties": large }] });
        assert!(refused(objects));
        let twice = json!({ "type": ["array", "array"], "allOf": [{ "type": "array", "items": large }] });
        assert!(refused(twice));
        let within = |pattern: &str, inner: Value| {
            let names: Map<_, _> = (0..1300).map(|i| (format!("{pattern}{i}"), json!(true))).collect();
            json!({ "type": "object", "properties": names, "patternProperties": { format!("^{pattern}"): inner } })
        };
        assert!(!refused(within("a", json!({}))));
        assert!(refused(within("a", within("b", within("c", json!(true))))));
        let words = |first: usize| json!({ "enum": (first..first + 35).map(|i| format!("w{i}")).collect::<Vec<_>>() });
        let combined = json!({ "allOf": [words(0), words(1), words(2)] });
        assert!(!refused(combined.clone()));
        let copies = vec![json!({ "type": "array" }); 880];
        assert!(refused(json!({ "anyOf": copies, "allOf": [{ "type": "array", "items": combined }] })));
        let long = json!({ "const": "x".repeat(50_000), "allOf": [{ "enum": vec!["a"; 200] }, { "enum": vec!["a"; 200] }] });
        assert!(refused(long));
        let tree = json!({ "type": "object", "properties": { "big": large }, "additionalProperties": { "$ref": "#/$defs/t" } });
        let places: Map<_, _> = (0..1300).map(|i| (format!("p{i}"), json!({ "type": "object" }))).collect();
        let grown = json!({
            "allOf": [{ "$ref": "#/$defs/t" }, { "type": "object", "properties": places }], "$defs": { "t": tree },
        });
        assert!(refused(grown));
        let patterns = |n: usize| (0..n).map(|i| (format!("^p{i}$"), json!({}))).collect::<Map<_, _>>();
        assert!(refused(json!({ "patternProperties": patterns(17) })));
        assert!(!refused(json!({ "patternProperties": patterns(16) })));
        assert!(!refused(large));
    }

    #[test]
    fn what_people_write_is_taken() {
        let entry = json!({
            "type": "object",
            "properties": {
                "name": { "type": "string", "description": "of it" },
                "kind": { "enum": (0..100).map(|i| format!("kind-{i}")).collect::<Vec<_>>() },
                "parent": { "anyOf": [{ "$ref": "#/$defs/entry" }, { "type": "null" }] },
                "children": { "type": "array", "items": { "$ref": "#/$defs/entry" } },
                "labels": { "type": "object", "additionalProperties": { "type": "string" } },
            },
        });
        let described = json!({ "$ref": "#/$defs/entry", "description": "a reference beside words" });
        let schema = json!({
            "type": "object",
            "properties": { "first": described, "rest": { "type": "array", "items": described } },
            "allOf": [{ "$ref": "#/$defs/entry" }, { "required": ["name"], "properties": { "name": { "maxLength": 9 } } }],
            "$defs": { "entry": entry },
        });
        assert_eq!(check(&schema), Ok(()));
        // As descriptions of interfaces have it.
        let extensible = json!({ "type": "object", "patternProperties": { "^x-": {} } });
        let definitions: Map<_, _> = (0..40).map(|i| (format!("d{i}"), extensible.clone())).collect();
        assert_eq!(check(&json!({ "type": ["object", "null"], "$defs": definitions })), Ok(()));
    }
}
