//! Reads the paths (`a::b::{c, d}`) in Rust source without a parser, and skips comments and
//! strings.

/// One path as written, with groups expanded: `use a::{b, c::d}` is `a::b` and `a::c::d`.
#[derive(Debug)]
pub struct PathUse {
    /// Names of the path; a glob ends in `*`.
    pub segments: Vec<String>,
    /// Line where the path starts, from 1.
    pub line: usize,
    /// Inline modules around the path, outermost first.
    pub inside: Vec<String>,
    /// True inside `pub(in ..)`, which names who may import and imports nothing.
    pub is_visibility: bool,
    /// True if the path begins with `::`: the first name is a crate.
    pub is_external: bool,
}

/// A name, `::`, or one other character; a literal is `"`.
pub struct Token {
    pub text: String,
    /// Line where the token begins, from 1.
    pub line: usize,
}

/// Returns every path in `source`; a name alone is a path of one segment.
pub fn paths(source: &str) -> Vec<PathUse> {
    let tokens = tokens(source);
    let text = |i: usize| tokens.get(i).map_or("", |t: &Token| t.text.as_str());
    let (mut found, mut modules, mut depth, mut i) =
        (Vec::new(), Vec::<(String, usize)>::new(), 0, 0);
    while i < tokens.len() {
        match text(i) {
            "mod" if is_name(text(i + 1)) && text(i + 2) == "{" => {
                depth += 1;
                modules.push((text(i + 1).to_owned(), depth));
                i += 3;
            }
            "{" => {
                depth += 1;
                i += 1;
            }
            "}" => {
                modules.pop_if(|(_, at)| *at == depth);
                depth = depth.saturating_sub(1);
                i += 1;
            }
            // Skipped, because `use ::x` would be read as the path `use::x`.
            "use" => i += 1,
            name if is_name(name) => {
                let (first, line) = (found.len(), tokens[i].line);
                let is_visibility =
                    i >= 3 && (text(i - 3), text(i - 2), text(i - 1)) == ("pub", "(", "in");
                let is_external = i >= 1 && text(i - 1) == "::";
                i = read(&tokens, i, Vec::new(), &mut found);
                // `use crate as x` hides every later path through x, so it counts as a glob.
                if text(i) == "as" && matches!(name, "crate" | "super") {
                    found[first].segments.push("*".to_owned());
                }
                for path in &mut found[first..] {
                    path.line = line.max(path.line);
                    path.inside = modules.iter().map(|(name, _)| name.clone()).collect();
                    (path.is_visibility, path.is_external) = (is_visibility, is_external);
                }
            }
            _ => i += 1,
        }
    }
    found
}

/// Reads one path, or one item of a group, from token `i`, and returns the token after it.
fn read(
    tokens: &[Token],
    mut i: usize,
    mut segments: Vec<String>,
    found: &mut Vec<PathUse>,
) -> usize {
    let text = |i: usize| tokens.get(i).map_or("", |t: &Token| t.text.as_str());
    let line = tokens.get(i).map_or(0, |t| t.line);
    loop {
        match text(i) {
            "{" => {
                i += 1;
                while i < tokens.len() && text(i) != "}" {
                    i = read(tokens, i, segments.clone(), found);
                    // Past `as alias`.
                    while i < tokens.len() && !matches!(text(i), "," | "}") {
                        i += 1;
                    }
                    i += usize::from(text(i) == ",");
                }
                return i + 1;
            }
            "*" => {
                segments.push("*".to_owned());
                i += 1;
                break;
            }
            name if is_name(name) => {
                segments.push(name.to_owned());
                i += 1;
            }
            _ => break,
        }
        let next = text(i + 1);
        if text(i) == "::" && (is_name(next) || next == "{" || next == "*") {
            i += 1;
        } else {
            break;
        }
    }
    found.push(PathUse {
        segments,
        line,
        inside: Vec::new(),
        is_visibility: false,
        is_external: false,
    });
    i
}

pub fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads the tokens of `source`, without comments.
pub fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut found, mut line, mut i) = (Vec::new(), 1, 0);
    while i < chars.len() {
        let start = i;
        let mut text = None;
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => i = block_comment_end(&chars, i),
            '"' => {
                i = string_end(&chars, i);
                text = Some("\"".to_owned());
            }
            // A character, not a lifetime: 'a' or '\n'.
            '\'' if at(i + 1) == '\\' || at(i + 2) == '\'' => {
                i += if at(i + 1) == '\\' { 3 } else { 2 };
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
                text = Some("\"".to_owned());
            }
            c if word(c) => {
                while word(at(i)) {
                    i += 1;
                }
                let name: String = chars[start..i].iter().collect();
                let hashes = (i..).take_while(|j| at(*j) == '#').count();
                if matches!(name.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                    i = raw_string_end(&chars, i, hashes);
                    text = Some("\"".to_owned());
                } else if name == "r" && hashes == 1 {
                    // A raw name, r#type.
                    i += 1;
                } else {
                    text = Some(name);
                }
            }
            ':' if at(i + 1) == ':' => {
                i += 2;
                text = Some("::".to_owned());
            }
            c if c.is_whitespace() => i += 1,
            c => {
                i += 1;
                text = Some(c.to_string());
            }
        }
        found.extend(text.map(|text| Token { text, line }));
        line += chars[start..i.min(chars.len())]
            .iter()
            .filter(|c| **c == '\n')
            .count();
    }
    found
}

/// Returns the end of a block comment; block comments nest.
fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// Returns the end of a raw string; `start` is the first hash, or the quote if there is none.
fn raw_string_end(chars: &[char], start: usize, hashes: usize) -> usize {
    let mut i = start + hashes + 1;
    while i < chars.len() {
        if chars[i] == '"' && chars[i + 1..].iter().take_while(|c| **c == '#').count() >= hashes {
            return i + 1 + hashes;
        }
        i += 1;
    }
    i
}
