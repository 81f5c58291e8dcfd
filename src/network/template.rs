//! The conflist template that UpdateRuntimeConfig renders with the pod CIDR: the part of Go's text/template that such
//! templates use, with the variables that existing templates for containerd know.
//!
//! Known: `{{.PodCIDR}}` (the first), `{{.PodCIDRRanges}}` and `{{.Routes}}` (the default route of each family) in
//! `{{range .X}}`, `{{range $v := .X}}` and `{{range $i, $v := .X}}` with `{{.}}`, `{{$v}}`, `{{$i}}` inside; `{{if X}}`,
//! `{{else}}`, `{{end}}`; comments `{{/* … */}}`; `{{-` and `-}}`. Anything else is refused by name.

use std::net::IpAddr;

use super::result::parse_cidr;
use crate::error::{Error, Result};

/// What a template may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Values {
    ranges: Vec<String>,
    routes: Vec<String>,
}

impl Values {
    /// Checks a comma-separated list of CIDRs, one or two families, each once.
    pub fn parse(pod_cidr: &str) -> Result<Values> {
        let mut values = Values { ranges: Vec::new(), routes: Vec::new() };
        for text in pod_cidr.split(',').map(str::trim) {
            let (ip, prefix) = parse_cidr(text).ok_or_else(|| Error::invalid(format!("pod CIDR {text:?} is not IP/PREFIX")))?;
            let route = if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" }.to_owned();
            if values.routes.contains(&route) {
                return Err(Error::invalid(format!("pod CIDR {pod_cidr:?} has two ranges of one family")));
            }
            // Host bits are dropped, as plugins want a network.
            values.ranges.push(format!("{}/{prefix}", masked(ip, prefix)));
            values.routes.push(route);
        }
        Ok(values)
    }
}

fn masked(ip: IpAddr, prefix: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)).into()),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)).into()),
    }
}

enum Node {
    Text(String),
    Show(Operand),
    Range { index: Option<String>, value: Option<String>, list: Operand, body: Vec<Node>, otherwise: Vec<Node> },
    If { test: Operand, body: Vec<Node>, otherwise: Vec<Node> },
}

/// `.`, `.Name` or `$name`.
enum Operand {
    Dot,
    Field(String),
    Variable(String),
}

#[derive(Clone)]
enum Datum {
    Text(String),
    Number(usize),
    List(Vec<String>),
}

enum Token<'a> {
    Text(&'a str),
    Action(&'a str),
}

/// How a block ended.
#[derive(PartialEq)]
enum Stop {
    Whole,
    End,
    Else,
}

/// Renders `template`.
pub fn render(template: &str, values: &Values) -> Result<String> {
    let tokens = split(template)?;
    let mut at = 0;
    let (nodes, end) = parse(&tokens, &mut at, 0)?;
    if end != Stop::Whole {
        return Err(Error::invalid("directive {{end}} or {{else}} without {{if}} or {{range}}"));
    }
    let mut out = String::new();
    let mut scope = Scope { values, dot: None, variables: Vec::new() };
    show(&nodes, &mut scope, &mut out)?;
    Ok(out)
}

fn split(template: &str) -> Result<Vec<Token<'_>>> {
    let mut tokens = Vec::new();
    let mut rest = template;
    let mut trim = false;
    loop {
        let Some(open) = rest.find("{{") else {
            tokens.push(Token::Text(if trim { rest.trim_start() } else { rest }));
            return Ok(tokens);
        };
        let inside = &rest[open + 2..];
        // A trim mark stands apart from what follows, or it would be a minus sign.
        let trim_left = inside.starts_with("- ") || inside.starts_with("-\n") || inside.starts_with("-\t");
        let mut text = &rest[..open];
        if trim {
            text = text.trim_start();
        }
        if trim_left {
            text = text.trim_end();
        }
        tokens.push(Token::Text(text));
        let inside = if trim_left { &inside[1..] } else { inside };
        let close = inside.find("}}").ok_or_else(|| Error::invalid("directive {{ is not closed by }}"))?;
        let action = &inside[..close];
        trim = action.ends_with(" -") || action.ends_with("\n-");
        let action = action.strip_suffix('-').filter(|_| trim).unwrap_or(action).trim();
        if !(action.starts_with("/*") && action.ends_with("*/")) {
            tokens.push(Token::Action(action));
        }
        rest = &inside[close + 2..];
    }
}

fn parse(tokens: &[Token<'_>], at: &mut usize, depth: usize) -> Result<(Vec<Node>, Stop)> {
    if depth > 16 {
        return Err(Error::invalid("directives are nested more than 16 deep"));
    }
    let mut nodes = Vec::new();
    while let Some(token) = tokens.get(*at) {
        *at += 1;
        let action = match token {
            Token::Text(text) => {
                nodes.push(Node::Text((*text).to_owned()));
                continue;
            }
            Token::Action(action) => *action,
        };
        let (word, rest) = action.split_once(char::is_whitespace).unwrap_or((action, ""));
        match word {
            "end" if rest.is_empty() => return Ok((nodes, Stop::End)),
            "else" if rest.is_empty() => return Ok((nodes, Stop::Else)),
            "if" => {
                let test = operand(rest.trim(), action)?;
                let (body, otherwise) = branches(tokens, at, depth, action)?;
                nodes.push(Node::If { test, body, otherwise });
            }
            "range" => {
                let (names, list) = rest.split_once(":=").unwrap_or(("", rest));
                let mut names =
                    names.split(',').map(str::trim).filter(|n| !n.is_empty()).map(|n| variable(n, action)).collect::<Result<Vec<_>>>()?;
                if names.len() > 2 {
                    return Err(unknown(action));
                }
                let value = names.pop();
                let list = operand(list.trim(), action)?;
                let (body, otherwise) = branches(tokens, at, depth, action)?;
                nodes.push(Node::Range { index: names.pop(), value, list, body, otherwise });
            }
            _ => nodes.push(Node::Show(operand(action, action)?)),
        }
    }
    Ok((nodes, Stop::Whole))
}

/// The body of an `if` or `range`, and what follows its `else`.
fn branches(tokens: &[Token<'_>], at: &mut usize, depth: usize, action: &str) -> Result<(Vec<Node>, Vec<Node>)> {
    let (body, mut end) = parse(tokens, at, depth + 1)?;
    let mut otherwise = Vec::new();
    if end == Stop::Else {
        (otherwise, end) = parse(tokens, at, depth + 1)?;
    }
    if end != Stop::End {
        return Err(Error::invalid(format!("directive {{{{{action}}}}} has no {{{{end}}}}")));
    }
    Ok((body, otherwise))
}

fn unknown(action: &str) -> Error {
    Error::invalid(format!("directive {{{{{action}}}}} is not known (.PodCIDR, .PodCIDRRanges, .Routes, range, if, else, end)"))
}

fn variable(text: &str, action: &str) -> Result<String> {
    let name = text.strip_prefix('$').filter(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'));
    Ok(name.ok_or_else(|| unknown(action))?.to_owned())
}

fn operand(text: &str, action: &str) -> Result<Operand> {
    match text {
        "." => Ok(Operand::Dot),
        ".PodCIDR" | ".PodCIDRRanges" | ".Routes" => Ok(Operand::Field(text[1..].to_owned())),
        _ => Ok(Operand::Variable(variable(text, action)?)),
    }
}

struct Scope<'a> {
    values: &'a Values,
    /// The element of the innermost range.
    dot: Option<String>,
    variables: Vec<(String, Datum)>,
}

impl Scope<'_> {
    fn get(&self, operand: &Operand) -> Result<Datum> {
        match operand {
            Operand::Dot => self.dot.clone().map(Datum::Text).ok_or_else(|| Error::invalid("directive {{.}} outside of {{range}}")),
            Operand::Field(name) if self.dot.is_some() => Err(Error::invalid(format!("directive {{{{.{name}}}}} inside of {{{{range}}}}"))),
            Operand::Field(name) => Ok(match name.as_str() {
                "PodCIDR" => Datum::Text(self.values.ranges[0].clone()),
                "PodCIDRRanges" => Datum::List(self.values.ranges.clone()),
                _ => Datum::List(self.values.routes.clone()),
            }),
            Operand::Variable(name) => {
                let found = self.variables.iter().rev().find(|(n, _)| n == name).map(|(_, v)| v.clone());
                found.ok_or_else(|| Error::invalid(format!("variable ${name} is not set")))
            }
        }
    }
}

fn show(nodes: &[Node], scope: &mut Scope<'_>, out: &mut String) -> Result<()> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push_str(text),
            Node::Show(operand) => match scope.get(operand)? {
                Datum::Text(text) => out.push_str(&text),
                Datum::Number(n) => out.push_str(&n.to_string()),
                Datum::List(list) => out.push_str(&format!("[{}]", list.join(" "))),
            },
            Node::If { test, body, otherwise } => {
                let holds = match scope.get(test)? {
                    Datum::Text(text) => !text.is_empty(),
                    Datum::Number(n) => n != 0,
                    Datum::List(list) => !list.is_empty(),
                };
                show(if holds { body } else { otherwise }, scope, out)?;
            }
            Node::Range { index, value, list, body, otherwise } => {
                let Datum::List(list) = scope.get(list)? else {
                    return Err(Error::invalid("directive {{range}} of something that is not a list"));
                };
                if list.is_empty() {
                    show(otherwise, scope, out)?;
                }
                let (outer, depth) = (scope.dot.take(), scope.variables.len());
                for (i, item) in list.into_iter().enumerate() {
                    scope.variables.extend(index.iter().map(|n| (n.clone(), Datum::Number(i))));
                    scope.variables.extend(value.iter().map(|n| (n.clone(), Datum::Text(item.clone()))));
                    scope.dot = Some(item);
                    show(body, scope, out)?;
                    scope.variables.truncate(depth);
                }
                scope.dot = outer;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, cidr: &str) -> Result<String> {
        super::render(template, &Values::parse(cidr)?)
    }

    #[test]
    fn cidrs_are_checked() {
        assert_eq!(Values::parse("10.1.2.3/16, fd00::1/64").unwrap().ranges, ["10.1.0.0/16", "fd00::/64"]);
        assert_eq!(Values::parse("10.1.2.3/0").unwrap().ranges, ["0.0.0.0/0"]);
        for bad in ["", "10.0.0.0", "10.0.0.0/8,10.1.0.0/16", "10.0.0.0/8,", "x/8", "10.0.0.0/8\"}"] {
            assert_eq!(Values::parse(bad).unwrap_err().code(), crate::error::Code::InvalidArgument, "{bad}");
        }
    }

    #[test]
    fn the_usual_template() {
        let template = r#"{"ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
            "subnet": "{{.PodCIDR}}", "routes": [{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}]}"#;
        let json: serde_json::Value = serde_json::from_str(&render(template, "10.1.0.0/24,fd00::/64").unwrap()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]], "subnet": "10.1.0.0/24",
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]})
        );
    }

    #[test]
    fn forms() {
        assert_eq!(render("{{range .Routes}}<{{.}}>{{end}}", "10.0.0.0/8").unwrap(), "<0.0.0.0/0>");
        assert_eq!(render("a {{- /* note */ -}} b {{ .PodCIDR }}", "10.0.0.0/8").unwrap(), "ab 10.0.0.0/8");
        assert_eq!(render("{{if .Routes}}y{{else}}n{{end}}", "::/0").unwrap(), "y");
    }

    #[test]
    fn the_unknown_is_refused_by_name() {
        for (template, words) in [
            ("{{.Foo}}", "{{.Foo}} is not known"),
            ("{{printf \"%s\" .PodCIDR}}", "is not known"),
            ("{{template \"x\"}}", "is not known"),
            ("{{.PodCIDR", "not closed"),
            ("{{if .Routes}}", "has no {{end}}"),
            ("{{end}}", "without"),
            ("{{.}}", "outside of {{range}}"),
            ("{{range .PodCIDR}}{{end}}", "not a list"),
            ("{{$x}}", "$x is not set"),
        ] {
            let e = render(template, "10.0.0.0/8").unwrap_err();
            assert!(e.message().contains(words), "{template}: {e}");
        }
        assert!(render(&"{{if .Routes}}".repeat(10_000), "10.0.0.0/8").is_err());
    }
}
