//! `crisp image fsck`.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::client::{Client, FOREVER};
use super::failure::{one_line, During, Failure, Outcome};
use super::json;
use super::table::{short_id, size};
use crate::api::admin::{CheckImagesRequest, CheckProgress, Problem};

/// Exit code when there is a problem that stays.
const PROBLEMS: u8 = 1;

/// Checks all images; what was found as text, and the exit code: 0 if all is well or mended.
pub fn fsck(client: &Client, repair: bool, json: bool) -> Outcome<(String, u8)> {
    let request = CheckImagesRequest { repair, ..CheckImagesRequest::default() };
    let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0));
    if let (Some(bar), Ok(style)) = (&bar, ProgressStyle::with_template("{spinner} checking [{bar:30}] {msg}")) {
        bar.set_style(style.progress_chars("=> "));
    }
    let (mut problems, mut end) = (Vec::new(), None);
    for message in client.admin().check_images(&request, FOREVER).during(|| "check images")? {
        let mut message: CheckProgress = message.during(|| "check images")?;
        problems.append(&mut message.problems);
        if let Some(bar) = &bar {
            let (bytes, total) = (unsigned(message.bytes), unsigned(message.total));
            bar.set_length(total.max(bytes));
            bar.set_position(bytes);
            bar.set_message(format!("{} of {} {}", size(bytes), size(total), one_line(&short_id(&message.subject))));
        }
        if message.finished {
            end = Some(message);
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let end = end.ok_or_else(|| Failure::failed("check images: the daemon ended it in between"))?;
    let open = problems.iter().filter(|p| is_open(p)).count();
    let code = if open > 0 { PROBLEMS } else { 0 };
    Ok((if json { as_json(&problems, &end) } else { as_text(&problems, &end, repair) }, code))
}

/// Whether it stays: what nobody can verify, or nobody needs, is no damage.
fn is_open(problem: &Problem) -> bool {
    problem.action.is_empty() && !matches!(problem.kind.as_str(), "unverifiable" | "orphan")
}

fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

fn as_json(problems: &[Problem], end: &CheckProgress) -> String {
    let problem =
        |p: &Problem| json!({ "kind": p.kind, "subject": p.subject, "message": p.message, "action": p.action, "images": p.images });
    json::text(&json!({
        "problems": problems.iter().map(problem).collect::<Vec<_>>(),
        "images": end.images, "layers": end.layers, "blobs": end.blobs,
    }))
}

fn as_text(problems: &[Problem], end: &CheckProgress, repair: bool) -> String {
    let mut text = String::new();
    for p in problems {
        text.push_str(&one_line(&format!("{} {}: {}", p.kind, p.subject, p.message)));
        if !p.action.is_empty() {
            text.push_str(&one_line(&format!("; {}", p.action)));
        }
        text.push('\n');
        for image in &p.images {
            text.push_str(&format!("    image {}\n", one_line(image)));
        }
    }
    text.push_str(&format!("checked {} images: {} layers, {} blobs; ", end.images, end.layers, end.blobs));
    let open = problems.iter().filter(|p| is_open(p)).count();
    // What is missing already, a pull alone can mend.
    let lacking = problems.iter().filter(|p| p.kind == "incomplete").count();
    text.push_str(&match problems.len() {
        0 => "all is well\n".to_owned(),
        n if open == 0 => format!("{n} found, none that needs more\n"),
        n if open == lacking => format!("{n} found; pull the incomplete images again\n"),
        n if repair => format!("{n} found, {open} not mended\n"),
        n => format!("{n} found; --repair mends {}\n", open - lacking),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(kind: &str, action: &str) -> Problem {
        Problem {
            kind: kind.into(),
            subject: "sha256:1".into(),
            message: "bad\nthing".into(),
            action: action.into(),
            images: vec!["a/b:1".into()],
            ..Default::default()
        }
    }

    #[test]
    fn words() {
        let end = CheckProgress { images: 2, layers: 3, blobs: 4, ..Default::default() };
        assert_eq!(as_text(&[], &end, false), "checked 2 images: 3 layers, 4 blobs; all is well\n");
        assert_eq!(
            as_text(&[problem("layer", "")], &end, false),
            "layer sha256:1: bad thing\n    image a/b:1\nchecked 2 images: 3 layers, 4 blobs; 1 found; --repair mends 1\n"
        );
        let mended = as_text(&[problem("layer", "marked"), problem("orphan", "")], &end, true);
        assert!(mended.contains("bad thing; marked\n") && mended.ends_with("2 found, none that needs more\n"), "{mended}");
        assert!(as_text(&[problem("blob", "")], &end, true).ends_with("1 found, 1 not mended\n"));
        let lacking = [problem("incomplete", ""), problem("layer", "marked")];
        assert!(as_text(&lacking, &end, true).ends_with("2 found; pull the incomplete images again\n"));
        let both = [problem("incomplete", ""), problem("layer", "")];
        assert!(as_text(&both, &end, false).ends_with("2 found; --repair mends 1\n"));
    }
}
