use minijinja::Environment;

use super::install;

fn render(template: &str) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(100_000));
    install(&mut environment);
    environment.render_str(template, ())
}

/// The expected texts were rendered by jinja2 3.1.6.
#[test]
fn expressions_render_as_in_python() {
    let cases = [
        ("1e-7", "1e-07"),
        ("1e16", "1e+16"),
        ("1.5e300|string", "1.5e+300"),
        ("0.0001", "0.0001"),
        ("2.0", "2.0"),
        ("123456789.123", "123456789.123"),
        (
            "[1e-7, 'a', none, true, {'k': 1.0}]",
            "[1e-07, 'a', None, True, {'k': 1.0}]",
        ),
        (
            "[\"it's\", 'a\"b', 'x\\n\\u00a0\\u200b']",
            "[\"it's\", 'a\"b', 'x\\n\\xa0\\u200b']",
        ),
        ("(1,)", "(1,)"),
        ("[undef]", "[Undefined]"),
        ("[1, 2, 3][1:]", "[2, 3]"),
        ("none|string", "None"),
        ("1|trim ~ none|trim", "1None"),
        ("'\\u001ca\\u001f'|trim", "a"),
        ("'\\u001ca \\u001f'.strip()", "a"),
        ("'xxaxx'.lstrip('x')", "axx"),
        ("none is iterable", "False"),
        ("undef is iterable", "True"),
        ("'a' is sequence", "True"),
        ("{'a': 1} is sequence", "True"),
        ("[1, 2][1:] is sequence", "True"),
        ("none is sequence", "False"),
        ("1 is sequence", "False"),
        ("'a b  c '.split(maxsplit=1)", "['a', 'b  c ']"),
        ("' a b  c '.rsplit(none, 1)", "[' a b', 'c']"),
        ("' a\\u001cb '.split()", "['a', 'b']"),
        ("'a,b,,c'.split(sep=',')", "['a', 'b', '', 'c']"),
        ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
        ("''.split() ~ ''.split(',')", "[]['']"),
        ("'a\\r\\nb\\u2028c\\n'.splitlines()", "['a', 'b', 'c']"),
        ("'a\\r\\nb'.splitlines(true)", "['a\\r\\n', 'b']"),
        ("'abc'.partition('b')", "('a', 'b', 'c')"),
        ("'abcb'.rpartition('b')", "('abc', 'b', '')"),
        ("'abc'.partition('x')", "('abc', '', '')"),
        ("'abc'.rpartition('x')", "('', '', 'abc')"),
        ("'abc'.removeprefix('a').removesuffix('c')", "b"),
        ("'éab'.index('b')", "2"),
        ("[1, 2].index(2)", "1"),
        (
            "'-5'.zfill(4) ~ 'a'.rjust(3) ~ 'a'.ljust(3, '.')",
            "-005  aa..",
        ),
        ("{'a': 1}.copy()", "{'a': 1}"),
        ("'aXb'.upper()", "AXB"),
    ];
    for (expression, expected) in cases {
        assert_eq!(
            render(&format!("{{{{ {expression} }}}}")).unwrap(),
            expected,
            "{expression}"
        );
    }
}

#[test]
fn what_python_refuses_is_refused() {
    for expression in [
        "'a'.split('')",
        "'a'.partition('')",
        "'abc'.index('z')",
        "[1].index(2)",
        "'a'.split(seperator=',')",
    ] {
        assert!(
            render(&format!("{{{{ {expression} }}}}")).is_err(),
            "{expression}"
        );
    }
}

#[test]
fn printing_is_paid_for() {
    // Every list contains the previous one twice.
    let doubled = "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}\
                   {% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}";
    assert!(render(doubled).is_err());
    let nested = "{% set ns = namespace(x=[0]) %}{% for i in range(500) %}{% set ns.x = [ns.x] %}\
                  {% endfor %}{{ ns.x }}";
    assert!(render(nested).is_err());
    assert!(render("{{ 'a'.ljust(1000000000) }}").is_err());
}
