//! What of a JSON schema the library would work on without a limit of its own: it is refused before.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

/// Greatest `multipleOf`, as digits without their point: as many states it takes to follow a number.
const GREATEST_DIVISOR: f64 = 10_000.0;
/// Most `patternProperties`: each pair of them is proved to be disjoint, whenever objects are merged.
const MOST_PATTERNS: usize = 16;
/// Most parts of a schema when its conjunctions are merged; each takes some 250 bytes.
const MOST_PARTS: f64 = 100_000.0;

/// Whether the library can take a schema; if not, why.
pub(super) fn check(schema: &Value) -> Result<(), String> {
    let mut facts = Facts::default();
    facts.collect(schema)?;
    if facts.patterns > MOST_PATTERNS {
        return Err(format!("{} patternProperties; {MOST_PATTERNS} are the most", facts.patterns));
    }
    let mut sizes = Sizes::new(schema, facts.tuples);
    let mut parts = sizes.of(schema, false).parts;
    while let Some(target) = sizes.kept.pop() {
        parts += sizes.of(target, false).parts;
    }
    if parts > MOST_PARTS {
        return Err(
            "its allOf, anyOf and $ref beside other keys would make too much of it when they are merged"
                .into(),
        );
    }
    Ok(())
}

/// What is counted in the whole text, wherever it stands.
#[derive(Default)]
struct Facts {
    patterns: usize,
    /// Whether there are arrays whose first elements have schemas of their own.
    tuples: bool,
}

impl Facts {
    fn collect(&mut self, value: &Value) -> Result<(), String> {
        match value {
            Value::Object(object) => {
                if let Some(divisor) = object.get("multipleOf").and_then(Value::as_f64) {
                    let digits = divisor.to_string().replace('.', "").parse().unwrap_or(f64::INFINITY);
                    if digits > GREATEST_DIVISOR {
                        return Err(format!("multipleOf {divisor} has too many digits"));
                    }
                }
                let patterns = object.get("patternProperties").and_then(Value::as_object);
                self.patterns += patterns.map_or(0, Map::len);
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
    /// Schemas in it, itself included.
    parts: f64,
    /// How many alternatives there are at most at one place: each gets a copy of the other.
    options: f64,
    /// Those of its parts that are for any element or property, so that the other's elements and properties each get a
    /// copy.
    loose: f64,
    /// Those of the loose that are so again within.
    loose_again: f64,
}

impl Size {
    const NOTHING: Self = Self { parts: 0.0, options: 1.0, loose: 0.0, loose_again: 0.0 };
    const ONE: Self = Self { parts: 1.0, ..Self::NOTHING };

    /// With a schema inside.
    fn with(self, inner: Self, loose: bool) -> Self {
        Self {
            parts: self.parts + inner.parts,
            options: self.options.max(inner.options),
            loose: self.loose + if loose { inner.parts } else { inner.loose },
            loose_again: self.loose_again + if loose { inner.loose } else { inner.loose_again },
        }
    }

    /// Of what fits both.
    fn and(self, other: Self) -> Self {
        let each = |a: fn(Self) -> f64| a(self) * other.options + a(other) * self.options;
        Self {
            parts: each(|s| s.parts) + self.loose * other.parts + other.loose * self.parts,
            options: self.options * other.options,
            loose: each(|s| s.loose) + self.loose_again * other.parts + other.loose_again * self.parts,
            loose_again: if self.loose_again.max(other.loose_again) > 0.0 {
                self.parts * other.parts
            } else {
                0.0
            },
        }
    }

    /// Of what fits one of several.
    fn any(all: impl Iterator<Item = Self>) -> Self {
        let mut any = Self { options: 0.0, ..Self::NOTHING };
        for one in all {
            let options = any.options + one.options;
            any = Self { options, ..any.with(one, false) };
        }
        Self { options: any.options.max(1.0), ..any }
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
}

impl<'a> Sizes<'a> {
    fn new(root: &'a Value, tuples: bool) -> Self {
        Self { root, tuples, references: HashSet::new(), kept: Vec::new(), merged: HashMap::new() }
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
        let constants = object.get("const").map(count).into_iter();
        let constants = constants.chain(object.get("enum").map(count));
        let own = [
            "properties",
            "patternProperties",
            "prefixItems",
            "items",
            "additionalItems",
            "additionalProperties",
        ];
        let own = own.iter().any(|key| object.contains_key(*key));
        let several = usize::from(own || object.contains_key("type"))
            + constants.clone().count()
            + list("allOf").len()
            + ["anyOf", "oneOf", "$ref"].iter().filter(|key| object.contains_key(**key)).count();
        let merged = merged || several > 1;

        let mut size = Size::ONE;
        for key in ["properties", "patternProperties"] {
            for inner in object.get(key).and_then(Value::as_object).into_iter().flat_map(Map::values) {
                size = size.with(self.of(inner, merged), key == "patternProperties");
            }
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
        for constants in constants {
            size = size.and(constants);
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
        match object.get("type") {
            // Of alternatives that hold nothing only one is left beside another.
            Some(Value::String(kind)) if kind != "object" && kind != "array" => Size { options: 0.0, ..size },
            _ => size,
        }
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
            // Within itself: the library refuses what never ends.
            Some(None) => Size::ONE,
            None => {
                self.merged.insert(reference, None);
                let size = self.target(reference).map_or(Size::ONE, |target| self.of(target, true));
                self.merged.insert(reference, Some(size));
                size
            }
        }
    }
}

/// The size of constants. Those that hold nothing are alternatives of which only one is left beside another.
fn count(value: &Value) -> Size {
    match value {
        Value::Array(values) => Size::any(values.iter().map(count)).and(Size::ONE),
        Value::Object(object) => {
            object.values().fold(Size::ONE, |size, value| size.with(count(value), false))
        }
        _ => Size { options: 0.0, ..Size::ONE },
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
        let chain = |levels: usize| {
            let mut definitions = json!({ "a0": { "type": "array" } });
            for level in 1..=levels {
                let below = json!({ "type": "array", "$ref": format!("#/$defs/a{}", level - 1) });
                definitions[format!("a{level}")] = json!({ "type": "array", "prefixItems": [below, below] });
            }
            json!({ "type": "array", "$ref": format!("#/$defs/a{levels}"), "$defs": definitions })
        };
        assert!(!refused(chain(8)));
        assert!(refused(chain(30)));
        // The same without anything to merge.
        let mut plain = chain(30);
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
                "kind": { "enum": (0..200).map(|i| format!("kind-{i}")).collect::<Vec<_>>() },
                "parent": { "anyOf": [{ "$ref": "#/$defs/entry" }, { "type": "null" }] },
                "children": { "type": "array", "items": { "$ref": "#/$defs/entry" } },
                "labels": { "type": "object", "additionalProperties": { "type": "string" } },
            },
        });
        let described = json!({ "$ref": "#/$defs/entry", "description": "a reference beside words" });
        let schema = json!({
            "type": "object",
            "properties": { "first": described, "rest": { "type": "array", "items": described } },
            "allOf": [{ "$ref": "#/$defs/entry" }, { "$ref": "#/$defs/entry" }, { "required": ["name"] }],
            "$defs": { "entry": entry },
        });
        assert_eq!(check(&schema), Ok(()));
    }
}
