//! Chat templates: a conversation as the text that the model was trained on.
//!
//! A model brings its template in Jinja, written for Hugging Face's library, which runs it on Python's Jinja2. So its
//! conventions hold here: block lines leave no blank line, `raise_exception`, `strftime_now` and `tojson` exist, strings
//! and mappings have Python's methods, and `messages`, `bos_token`, `eos_token` and `add_generation_prompt` are set.
//!
//! A template is a program from the model's file. It can reach nothing but its arguments, its steps and the text that it
//! makes are counted, so that it can't run for ever, and it is read and run on a deep stack, whatever it nests.

use std::io;
use std::sync::Arc;

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use time::OffsetDateTime;

use crate::deep::{LONGEST_TEXT, on_deep_stack};
use crate::weights::Fault;
use crate::{ChatMessage, RequestError, RequestErrorKind};

/// ChatML, for models that bring no template: the most common one among instruction-tuned models.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' }}{% endif %}";
/// The one template's name.
const NAME: &str = "chat_template";
/// Steps that a template may take (64 bytes of text count as one): enough for 10,000 messages, less than a second, and so few
/// that the deepest value they can make fits the stack.
const FUEL: u64 = 2_000_000;

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Reads a template; `None`: ChatML. `bos`, `eos`: the model's begin and end tokens as text.
    pub(crate) fn new(source: Option<&str>, bos: &str, eos: &str) -> Result<Self, Fault> {
        let source = source.unwrap_or(CHATML);
        if source.len() > LONGEST_TEXT {
            let message = format!("a chat template of {} bytes; {LONGEST_TEXT} are the most", source.len());
            return Err(Fault::Unsupported(message));
        }
        let environment = on_deep_stack("template", || environment(source))
            .unwrap_or_else(|_| Err("the library fails on it".into()))
            .map_err(|e| Fault::Unsupported(format!("the chat template can't be read: {e}")))?;
        Ok(Self { environment: Arc::new(environment), bos: bos.into(), eos: eos.into() })
    }

    /// The prompt that asks for the assistant's next turn.
    ///
    /// The date is today's where a template asks for it (in UTC), so a prompt can differ from one day to the next.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, RequestError> {
        // What the template made goes where it was made: letting go of it descends, too.
        let result = on_deep_stack("template", || self.run(messages).map_err(|e| (e.kind(), explain(&e))));
        let message = match result {
            Ok(Ok(text)) => return Ok(text),
            Ok(Err((ErrorKind::OutOfFuel, _))) => {
                "the model's chat template takes too many steps for these messages".into()
            }
            Ok(Err((_, why))) => format!("the model's chat template does not take these messages: {why}"),
            // The library has panicked on odd templates before.
            Err(_) => "the model's chat template fails on these messages".into(),
        };
        Err(RequestError { kind: RequestErrorKind::Invalid, message })
    }

    fn run(&self, messages: &[ChatMessage]) -> Result<String, Error> {
        let message = |m: &ChatMessage| context! { role => m.role.as_str(), content => m.content.as_str() };
        let list: Vec<Value> = messages.iter().map(message).collect();
        let mut env = (*self.environment).clone();
        env.set_fuel(Some(FUEL));
        env.get_template(NAME)?.render(context! {
            messages => list,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            add_generation_prompt => true,
            tools => (),
            documents => (),
        })
    }
}

/// The template, read, with what it may call.
fn environment(source: &str) -> Result<Environment<'static>, String> {
    let mut env = Environment::new();
    let syntax = env.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| e.to_string())?);
    env.set_unknown_method_callback(unknown_method_callback);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", to_json);
    env.add_template_owned(NAME, without_generation_marks(source)).map_err(|e| explain(&e))?;
    Ok(env)
}

/// An error in one line.
fn explain(error: &Error) -> String {
    match (error.detail(), error.line()) {
        (Some(detail), Some(line)) if !is_raised(error) => format!("{detail} (line {line})"),
        (Some(detail), _) => detail.to_owned(),
        (None, _) => error.to_string(),
    }
}

/// Marks an error that the template raised itself.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

fn is_raised(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|s| s.is::<Raised>())
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
}

/// The time by C's `strftime` format, in UTC.
fn strftime_now(format: &str) -> Result<String, Error> {
    let bad =
        |e: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}"));
    let items = time::format_description::parse_strftime_borrowed(format).map_err(|e| bad(&e))?;
    OffsetDateTime::now_utc().format(&items).map_err(|e| bad(&e))
}

/// Python's `json.dumps` with `ensure_ascii=False`, as Hugging Face's library has it.
fn to_json(value: &Value, args: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = args.get("indent")?;
    // Accepted for what they are by default; what they would change is not supported.
    let _: (Option<bool>, Option<bool>) = (args.get("ensure_ascii")?, args.get("sort_keys")?);
    args.assert_all_used()?;
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Python::new(indent));
    value
        .serialize(&mut serializer)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// JSON with Python's spaces: `{"a": 1, "b": [2, 3]}`, or one element a line.
struct Python {
    indent: Option<usize>,
    depth: usize,
    /// Whether the innermost open list or object has an element.
    filled: bool,
}

impl Python {
    fn new(indent: Option<usize>) -> Self {
        // More is of no use to anyone but someone who wants a lot of spaces.
        Self { indent: indent.map(|n| n.min(16)), depth: 0, filled: false }
    }

    fn line<W: ?Sized + io::Write>(&self, w: &mut W) -> io::Result<()> {
        match self.indent {
            Some(n) => write!(w, "\n{:1$}", "", n * self.depth),
            None => Ok(()),
        }
    }

    fn begin<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        w.write_all(bracket)
    }

    fn end<W: ?Sized + io::Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(w)?;
        }
        self.filled = true;
        w.write_all(bracket)
    }

    fn element<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(if self.indent.is_some() { b"," } else { b", " })?;
        }
        self.line(w)
    }
}

impl serde_json::ser::Formatter for Python {
    fn begin_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.begin(w, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.end(w, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.element(w, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.begin(w, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.end(w, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.element(w, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }
}

/// Takes out the marks of Hugging Face's `{% generation %}` block, which is for training: what is in it stays.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%").map(|n| n + 2) {
        let Some(end) = rest[start..].find("%}").map(|n| start + n) else { break };
        let tag = &rest[start..end];
        let name = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match name {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        out.push_str(&rest[..start]);
        out.push_str(&replacement);
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.into(), content: content.into() }
    }

    fn render(source: &str, messages: &[ChatMessage]) -> Result<String, RequestError> {
        ChatTemplate::new(Some(source), "<s>", "</s>").unwrap().render(messages)
    }

    #[test]
    fn without_a_template_it_is_chatml() {
        let template = ChatTemplate::new(None, "", "").unwrap();
        let text = template.render(&[message("system", "Be brief."), message("user", "Hi {{ x }}")]).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ x }}<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn a_refusal_is_the_requests_fault_and_says_why() {
        let source =
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok";
        let error = render(source, &[message("system", "x")]).unwrap_err();
        assert_eq!(error.kind, RequestErrorKind::Invalid);
        assert!(error.message.ends_with("does not take these messages: no system role"), "{error}");
        assert_eq!(render(source, &[message("user", "x")]).unwrap(), "ok");
        let error = render("{{ messages[0].content.nothing.more }}", &[message("user", "x")]).unwrap_err();
        assert_eq!(error.kind, RequestErrorKind::Invalid);
    }

    #[test]
    fn a_template_can_not_run_for_ever() {
        let source =
            "{% for i in range(9999) %}{% for j in range(9999) %}{{ i * j }}{% endfor %}{% endfor %}";
        let error = render(source, &[]).unwrap_err();
        assert!(error.message.contains("too many steps"), "{error}");
        assert!(render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", &[]).is_err());
    }

    #[test]
    fn a_template_that_can_not_be_read_is_refused() {
        for source in ["{% for %}", "{{ a", "{% if x %}", "{% nonsense %}", "{%}", "{%%}", "{%"] {
            assert!(
                matches!(ChatTemplate::new(Some(source), "", ""), Err(Fault::Unsupported(_))),
                "{source}"
            );
        }
    }

    #[test]
    fn what_nests_as_deep_as_a_file_may_is_read_or_refused() {
        let most = LONGEST_TEXT - 16;
        for (part, end) in
            [("not ", "x"), ("-", "1"), ("1 + ", "1"), ("x.a", ""), ("x|f", ""), ("(", "1"), ("[", "")]
        {
            let source = format!("{{{{ {}{end} }}}}", part.repeat(most / part.len()));
            // Most can be read: nothing but the length of the text is against them.
            drop(ChatTemplate::new(Some(&source), "", ""));
        }
        let branches = "{% elif x %}".repeat(most / 12 - 2);
        assert!(ChatTemplate::new(Some(&format!("{{% if x %}}{branches}{{% endif %}}")), "", "").is_ok());
        assert!(ChatTemplate::new(Some(&"x".repeat(LONGEST_TEXT + 1)), "", "").is_err());
    }

    #[test]
    fn the_deepest_value_that_a_template_can_make_is_let_go_of() {
        let source = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(9999) %}\
                      {% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
        assert!(render(source, &[]).unwrap_err().message.contains("too many steps"));
        // As many levels a step as the library reads in one expression, and then written out.
        let (open, close) = ("[".repeat(60), "]".repeat(60));
        for shown in ["ns.x", "ns.x | tojson"] {
            let source = format!(
                "{{% set ns = namespace(x=[]) %}}{{% for i in range(12000) %}}{{% set ns.x = {open}ns.x{close} %}}{{% endfor %}}\
                 {{{{ {shown} }}}}"
            );
            assert!(render(&source, &[]).unwrap().starts_with("[[[["), "{shown}");
        }
    }

    /// `templates.json` holds templates with the constructs that models' templates are made of, and what Python makes of
    /// them.
    #[test]
    fn texts_are_those_of_python() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/templates.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut wrong = Vec::new();
        for case in json["cases"].as_array().unwrap() {
            let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
            let messages: Vec<_> = case["messages"].as_array().unwrap().iter().collect();
            let messages: Vec<_> =
                messages.iter().map(|m| message(&text(&m["role"]), &text(&m["content"]))).collect();
            let got = render(&text(&case["template"]), &messages);
            let fits = match (&got, case["text"].as_str()) {
                (Ok(got), Some(want)) => got == want,
                (Err(_), None) => true,
                _ => false,
            };
            if !fits {
                wrong.push(format!("{}: {got:#?}, not {:#?}", case["name"], case["text"]));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn the_date_is_there() {
        let text = render("{{ strftime_now('%Y-%m-%d %d %b %Y %%') }}", &[]).unwrap();
        assert!(
            text.starts_with(&OffsetDateTime::now_utc().year().to_string()) && text.ends_with(" %"),
            "{text}"
        );
        assert!(render("{{ strftime_now('%!') }}", &[]).is_err());
    }
}
